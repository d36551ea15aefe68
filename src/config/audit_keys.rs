//! The files of the keys that sign the audit log, and how one gives way to the next.
//!
//! Each line is on the disk before the next one begins:
//!
//! ```text
//! audit.key   audit.key.next   audit.pub   the log
//! K1                           K1          signed by K1
//! K1          K2               K1          signed by K1
//! K1          K2               K1          handed over by K1 to K2, signed by both; from here on signed by K2
//! K2                           K1          audit.key.next renamed over audit.key
//! K2                           K1 K2       every public half on a line of its own, the newest last
//! ```
//!
//! INVARIANT: every key that the log was handed over to, or may yet be, is in one of the two key files. So nothing but a
//! start removes `audit.key.next`: when it has asked the log and the log knows nothing of it. A handover whose answer
//! never came is asked for again with the same key.
//!
//! Where `audit.key` is lost, a start that accepts a loss goes on with another key, which nobody vouches for:
//!
//! ```text
//! audit.key   audit.key.next   audit.pub   the log
//! -           K2               K1          signed by K1
//! -           K2               K1          says that the key was lost; from here on signed by K2
//! -           K2               K1 K2
//! K2                           K1 K2       audit.key.next renamed over audit.key
//! ```
//!
//! Ended before the last of these, the next start that accepts a loss does it again with the same key, and says so again.

use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio::task::JoinError;

use super::assembly::StartError;
use crate::audit::{self, AuditError, Log, SigningKey, VerifyingKey};
use crate::broker::BrokerError;
use crate::broker::keys::{AuditKeyInfo, AuditKeyRotated, AuditKeys};
use crate::clock::SharedClock;
use crate::crypto::{KeyProblem, create_key_file, read_key_file};
use crate::error::Reason;

/// The longest key file, in bytes.
const MOST: usize = 1_024;

/// Opens the log that `settings` name with the key in `folder`, and gives what rotates that key. The first key is made
/// with the first log: later, a log without its key is refused, or where a loss is accepted goes on with a new one and says
/// so. A rotation that a crash cut short is finished, or undone, as the log says.
pub(super) fn open_log(
    folder: &Path,
    settings: audit::Settings,
    clock: SharedClock,
) -> Result<(Log, Arc<AuditKeyFiles>), StartError> {
    let files = Files::below(folder);
    let has_begun = settings.expected.is_some() || settings.directory.join(&settings.instance).exists();
    let log = match files.key.exists() {
        false if has_begun && settings.accept_loss => files.open_with_another(settings, clock)?,
        false if !has_begun => {
            make(&files.key)?;
            files.open(settings, clock)?
        }
        _ => files.open(settings, clock)?,
    };
    files.forget_next()?;
    let shared = Shared { log: log.clone(), files, turn: Mutex::new(()) };
    Ok((log, Arc::new(AuditKeyFiles { shared: Arc::new(shared) })))
}

/// Rotates the key of a log that is open.
pub(super) struct AuditKeyFiles {
    shared: Arc<Shared>,
}

struct Shared {
    log: Log,
    files: Files,
    /// Held by the one rotation at a time.
    turn: Mutex<()>,
}

#[async_trait]
impl AuditKeys for AuditKeyFiles {
    async fn rotate(&self) -> Result<AuditKeyRotated, BrokerError> {
        // Whoever asks may go away: a handover that is in the log must reach the files all the same.
        match tokio::spawn(Arc::clone(&self.shared).rotate()).await {
            Ok(rotated) => rotated,
            Err(error) => Err(defect(&error)),
        }
    }

    fn status(&self) -> Vec<AuditKeyInfo> {
        let keys = self.shared.log.verifying_keys();
        keys.iter().rev().enumerate().map(|(place, key)| info(key, place == 0)).collect()
    }
}

impl Shared {
    async fn rotate(self: Arc<Self>) -> Result<AuditKeyRotated, BrokerError> {
        let _turn = self.turn.lock().await;
        let prepare = |shared: &Self| {
            // What an earlier rotation may have left to do.
            shared.files.settle(&shared.log.verifying_keys())?;
            shared.files.next_key()
        };
        let next = self.off_the_reactor(prepare).await?;
        let (key, at) = self.log.rotate_key(next).await?;
        self.off_the_reactor(|shared| shared.files.settle(&shared.log.verifying_keys())).await?;
        Ok(AuditKeyRotated { info: info(&key, true), at })
    }

    async fn off_the_reactor<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, AuditError> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let shared = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(shared.as_ref())).await {
            Ok(result) => Ok(result?),
            Err(error) => Err(defect(&error)),
        }
    }
}

fn info(key: &VerifyingKey, in_force: bool) -> AuditKeyInfo {
    AuditKeyInfo { id: key.id(), public_key: key.to_hex(), in_force }
}

fn defect(error: &JoinError) -> BrokerError {
    let message = format!("rotating the audit key failed: {error}");
    BrokerError::Rejected { reason: Reason::Internal, message }
}

/// The public halves below `folder`, the newest last.
pub(super) fn public(folder: &Path) -> Result<Vec<VerifyingKey>, AuditError> {
    Files::below(folder).listed()
}

/// Where the keys are.
#[derive(Debug)]
struct Files {
    folder: PathBuf,
    key: PathBuf,
    next: PathBuf,
    public: PathBuf,
}

impl Files {
    fn below(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            key: folder.join("audit.key"),
            next: folder.join("audit.key.next"),
            public: folder.join("audit.pub"),
        }
    }

    /// Opens the log with its key.
    fn open(&self, mut settings: audit::Settings, clock: SharedClock) -> Result<Log, AuditError> {
        let key = self.key_in_force(&settings.directory)?;
        settings.former_keys = self.published(key.verifying_key(), &settings.directory)?;
        Log::open(settings, key, clock).map_err(|error| of_file(&self.key, error))
    }

    /// Opens the log with another key than the one that is lost, and says so in it.
    fn open_with_another(
        &self,
        mut settings: audit::Settings,
        clock: SharedClock,
    ) -> Result<Log, AuditError> {
        let next = match self.read_next()? {
            Some(next) => next,
            None => {
                self.forget_next()?;
                make(&self.next)?
            }
        };
        settings.former_keys = self.listed()?;
        settings.losses.push(format!(
            "the key that signs the log, {}, does not exist any more: key {} signs from here on, and no key before it \
             vouches for that",
            self.key.display(),
            next.id()
        ));
        let log = Log::open(settings, next, clock).map_err(|error| of_file(&self.next, error))?;
        // In this order: as long as there is no audit.key, nothing is taken to be in force.
        self.publish(&log.verifying_keys())?;
        self.replace()?;
        Ok(log)
    }

    /// The key that the log below `log` goes on with. Where it was handed over to the next one already, that takes its
    /// place.
    fn key_in_force(&self, log: &Path) -> Result<SigningKey, AuditError> {
        let key = read(&self.key)?;
        let Some(next) = self.read_next()? else { return Ok(key) };
        if !audit::hands_over(log, &key.verifying_key(), &next.verifying_key())? {
            return Ok(key);
        }
        self.replace()?;
        tracing::info!(
            key = next.id(),
            "a rotation of the audit key was cut short after its handover; it is finished"
        );
        Ok(next)
    }

    /// The key that is to follow. `None` where there is none, or a part of one, which was never used.
    fn read_next(&self) -> Result<Option<SigningKey>, AuditError> {
        match read_key_file(&self.next, MOST) {
            Ok(document) => Ok(SigningKey::from_pkcs8(&document).ok()),
            Err(error) => match error.problem() {
                KeyProblem::Missing | KeyProblem::Empty => Ok(None),
                problem => Err(refused(&self.next, problem)),
            },
        }
    }

    fn next_key(&self) -> Result<SigningKey, AuditError> {
        match self.read_next()? {
            Some(next) => Ok(next),
            None => make(&self.next),
        }
    }

    /// Removes the key that was to follow. For a start, when the log is open with another one and knows nothing of it.
    fn forget_next(&self) -> Result<(), AuditError> {
        match std::fs::remove_file(&self.next) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(refused(&self.next, error)),
        }
    }

    /// Puts the next key in the place of the one in force.
    fn replace(&self) -> Result<(), AuditError> {
        std::fs::rename(&self.next, &self.key).map_err(|error| refused(&self.key, error))?;
        self.sync()
    }

    /// Every public half, the newest last; published where it is missing. One that is there is never overwritten: it is
    /// what old checkpoints are verified with.
    fn published(&self, key: VerifyingKey, log: &Path) -> Result<Vec<VerifyingKey>, AuditError> {
        let mut keys = self.listed()?;
        let last = keys.last().copied();
        if last == Some(key) {
            return Ok(keys);
        }
        if let Some(last) = last
            && !audit::hands_over(log, &last, &key)?
        {
            let problem = "does not end with the public half of audit.key; put the right audit.key back";
            return Err(refused(&self.public, problem));
        }
        keys.push(key);
        self.publish(&keys)?;
        Ok(keys)
    }

    /// Every public half that is published, the newest last.
    fn listed(&self) -> Result<Vec<VerifyingKey>, AuditError> {
        let strange =
            |_| refused(&self.public, "does not hold a public key on each line; restore it from a backup");
        match std::fs::read_to_string(&self.public) {
            Ok(text) => VerifyingKey::parse_list(&text).map_err(strange),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(refused(&self.public, error)),
        }
    }

    /// Brings the files to what the log is, whose last key is the one in force.
    fn settle(&self, keys: &[VerifyingKey]) -> Result<(), AuditError> {
        let next = self.read_next()?.map(|next| next.verifying_key());
        if next.is_some() && next.as_ref() == keys.last() {
            self.replace()?;
        }
        let published = std::fs::read_to_string(&self.public).ok();
        let published = published.and_then(|text| VerifyingKey::parse_list(&text).ok());
        if published.as_deref() == Some(keys) { Ok(()) } else { self.publish(keys) }
    }

    /// Puts the public halves into the place of those that are there.
    fn publish(&self, keys: &[VerifyingKey]) -> Result<(), AuditError> {
        let text: String = keys.iter().map(|key| format!("{key}\n")).collect();
        let unfinished = self.folder.join("audit.pub.unfinished");
        let written = File::create(&unfinished).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&unfinished, &self.public)
        });
        written.map_err(|error| refused(&self.public, error))?;
        self.sync()
    }

    /// Makes what was renamed or removed stay so.
    fn sync(&self) -> Result<(), AuditError> {
        let synced = File::open(&self.folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| refused(&self.folder, error))
    }
}

/// Makes a key and keeps it in a file of its own.
fn make(path: &Path) -> Result<SigningKey, AuditError> {
    let document = SigningKey::generate_pkcs8()?;
    create_key_file(path, &document).map_err(|error| refused(path, error.problem()))?;
    SigningKey::from_pkcs8(&document)
}

/// The key in this file, which a log was signed with.
pub(super) fn read(path: &Path) -> Result<SigningKey, AuditError> {
    const MEND: &str = "start once with --accept-loss, which begins with a new key, on record";
    let document = read_key_file(path, MOST).map_err(|error| match error.problem() {
        KeyProblem::Missing => refused(path, format!("does not exist; restore it from a backup, or {MEND}")),
        KeyProblem::Empty => {
            refused(path, format!("is empty; restore it from a backup, or remove it and {MEND}"))
        }
        problem => refused(path, problem),
    })?;
    SigningKey::from_pkcs8(&document).map_err(|error| of_file(path, error))
}

fn refused(path: &Path, problem: impl fmt::Display) -> AuditError {
    AuditError::Key { path: path.display().to_string(), problem: problem.to_string() }
}

/// Names the file that a key was read from.
fn of_file(path: &Path, error: AuditError) -> AuditError {
    match error {
        AuditError::Key { problem, .. } => refused(path, problem),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Report, Settings};
    use crate::clock::ManualClock;
    use crate::error::Reasoned;
    use futures_util::FutureExt as _;
    use std::os::unix::fs::PermissionsExt as _;

    struct Place {
        folder: tempfile::TempDir,
        files: Files,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let files = Files::below(folder.path());
            Self { folder, files }
        }

        fn audit(&self) -> PathBuf {
            self.folder.path().join("audit")
        }

        fn clock(&self) -> SharedClock {
            ManualClock::new("2026-01-02T03:04:05Z".parse().unwrap())
        }

        fn settings(&self, accept_loss: bool) -> Settings {
            Settings { accept_loss, ..Settings::new(self.audit(), "a") }
        }

        fn try_open(&self) -> Result<(Log, Arc<AuditKeyFiles>), StartError> {
            open_log(self.folder.path(), self.settings(false), self.clock())
        }

        fn accept_loss(&self) -> (Log, Arc<AuditKeyFiles>) {
            open_log(self.folder.path(), self.settings(true), self.clock()).unwrap()
        }

        fn open(&self) -> (Log, Arc<AuditKeyFiles>) {
            self.try_open().unwrap()
        }

        fn refusal(&self) -> String {
            let error = self.try_open().map(|_| ()).unwrap_err();
            assert!(matches!(error.reason(), Reason::InvalidKey | Reason::AuditBroken), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
            error.to_string()
        }

        fn public(&self) -> Vec<VerifyingKey> {
            VerifyingKey::parse_list(&std::fs::read_to_string(&self.files.public).unwrap()).unwrap()
        }

        /// What the log is to each of its keys alone, and to all of them.
        fn verify(&self) -> Vec<Report> {
            let keys = self.public();
            let alone = keys.iter().map(std::slice::from_ref).chain([keys.as_slice()]);
            alone.map(|keys| audit::verify(&self.audit(), keys, &[]).unwrap()).collect()
        }

        /// That everything is as after a rotation that nobody disturbed.
        fn is_settled(&self, keys: &[VerifyingKey]) {
            assert_eq!(self.public(), keys);
            assert_eq!(read(&self.files.key).unwrap().verifying_key(), *keys.last().unwrap());
            assert!(!self.files.next.exists());
            for report in self.verify() {
                assert!(report.is_clean(), "{report:?}");
            }
        }
    }

    #[tokio::test]
    async fn the_first_key_is_made_with_the_first_log_and_never_again() {
        let place = Place::new();
        let (log, keys) = place.open();
        let key = log.verifying_keys();
        assert_eq!(keys.status(), [info(&key[0], true)]);
        log.close().await.unwrap();
        drop((log, keys));
        place.is_settled(&key);
        place.open().0.close().await.unwrap();
        place.is_settled(&key);
        let good = std::fs::read(&place.files.key).unwrap();
        std::fs::write(&place.files.key, "").unwrap();
        assert!(place.refusal().contains("audit.key: is empty; restore it from a backup, or remove it"));
        std::fs::remove_file(&place.files.key).unwrap();
        let refusal = place.refusal();
        assert!(refusal.contains("audit.key: does not exist; restore it from a backup"), "{refusal}");
        assert!(refusal.contains("--accept-loss") && !refusal.contains("create"), "{refusal}");
        assert!(!place.files.key.exists() && !place.files.next.exists());
        create_key_file(&place.files.key, &good).unwrap();
        place.open().0.close().await.unwrap();
        place.is_settled(&key);
    }

    #[tokio::test]
    async fn a_loss_that_is_accepted_changes_no_key_that_is_there() {
        let place = Place::new();
        let (log, keys) = place.accept_loss();
        let first = log.verifying_keys();
        log.close().await.unwrap();
        drop((log, keys));
        place.accept_loss().0.close().await.unwrap();
        place.is_settled(&first);
        let report = audit::verify(&place.audit(), &first, &[]).unwrap();
        assert_eq!(report.instances[0].losses, 0, "the first key of the first log was not lost");
    }

    #[tokio::test]
    async fn a_log_whose_key_is_lost_goes_on_with_another_and_says_so() {
        let place = Place::new();
        let (log, keys) = place.open();
        keys.rotate().await.unwrap();
        let mut known = log.verifying_keys();
        log.close().await.unwrap();
        drop((log, keys));
        let lost = std::fs::read(&place.files.key).unwrap();
        std::fs::remove_file(&place.files.key).unwrap();

        let (log, keys) = place.accept_loss();
        assert_eq!(log.verifying_keys()[..2], known);
        known = log.verifying_keys();
        assert_eq!((known.len(), keys.status()[0].public_key.clone()), (3, known[2].to_hex()));
        log.close().await.unwrap();
        drop((log, keys));
        assert_eq!(place.public(), known);
        assert_eq!(read(&place.files.key).unwrap().verifying_key(), known[2]);
        let mode = std::fs::metadata(&place.files.key).unwrap().permissions().mode();
        assert_eq!((mode & 0o7777, place.files.next.exists()), (0o600, false));

        // From then on nothing has to be accepted, and the key can be rotated as any other.
        let (log, keys) = place.open();
        keys.rotate().await.unwrap();
        known = log.verifying_keys();
        log.close().await.unwrap();
        drop((log, keys));
        let report = audit::verify(&place.audit(), &known, &[]).unwrap();
        assert!(report.is_clean() && report.unanchored() == 0, "{report:?}");
        assert_eq!(report.instances[0].losses, 1);
        let report = audit::verify(&place.audit(), &known[..2], &[]).unwrap();
        assert!(
            !report.is_clean(),
            "whoever has the earlier public halves alone sees that another key signs"
        );

        std::fs::remove_file(&place.files.key).unwrap();
        create_key_file(&place.files.key, &lost).unwrap();
        assert!(place.refusal().contains("put the right audit.key back"), "{}", place.refusal());
    }

    #[tokio::test]
    async fn a_start_with_another_key_that_ends_anywhere_is_done_again() {
        type Until = fn(&Files, &[VerifyingKey]);
        let stages: [(&str, bool, u64, Until); 4] = [
            ("half a key is kept", false, 1, |files, _| {
                create_key_file(&files.next, &SigningKey::generate_pkcs8().unwrap()[..20]).unwrap();
            }),
            ("the next key is kept", false, 1, |files, _| drop(files.next_key().unwrap())),
            ("the log goes on with it", true, 2, |_, _| {}),
            ("it is published", true, 2, |files, keys| files.publish(keys).unwrap()),
        ];
        for (name, log_goes_on, losses, until) in stages {
            let place = Place::new();
            let (log, keys) = place.open();
            let former = log.verifying_keys();
            drop((log, keys));
            std::fs::remove_file(&place.files.key).unwrap();
            let mut known = former.clone();
            if log_goes_on {
                let next = place.files.next_key().unwrap();
                let losses = vec!["the key was lost".to_owned()];
                let settings = Settings { former_keys: former, losses, ..place.settings(true) };
                let log = Log::open(settings, next, place.clock()).unwrap();
                known = log.verifying_keys();
            }
            until(&place.files, &known);
            assert!(place.refusal().contains("--accept-loss"), "{name}: {}", place.refusal());
            let (log, keys) = place.accept_loss();
            if log_goes_on {
                assert_eq!(log.verifying_keys(), known, "{name}: no third key is made");
            }
            known = log.verifying_keys();
            drop((log, keys));
            let (log, _keys) = place.open();
            log.close().await.unwrap();
            assert_eq!((place.public(), known.len()), (known.clone(), 2), "{name}");
            assert!(!place.files.next.exists(), "{name}");
            let report = audit::verify(&place.audit(), &known, &[]).unwrap();
            assert!(report.is_clean(), "{name}: {report:?}");
            assert_eq!(report.instances[0].losses, losses, "{name}");
        }
    }

    #[tokio::test]
    async fn a_key_gives_way_to_the_next_in_the_log_and_in_the_files() {
        let place = Place::new();
        let (log, keys) = place.open();
        let mut known = log.verifying_keys();
        for _ in 0..3 {
            let rotated = keys.rotate().await.unwrap();
            known.push(VerifyingKey::parse(&rotated.info.public_key).unwrap());
            assert!(rotated.info.in_force);
            assert_eq!(log.verifying_keys(), known);
            let status = keys.status();
            assert_eq!(status[0], rotated.info, "the one in force comes first");
            assert_eq!(status.iter().filter(|key| key.in_force).count(), 1);
            place.is_settled(&known);
            let mode = std::fs::metadata(&place.files.key).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o600);
        }
        log.close().await.unwrap();
        drop((log, keys));
        let (log, keys) = place.open();
        assert_eq!((log.verifying_keys(), keys.status().len()), (known.clone(), 4));
        log.close().await.unwrap();
        place.is_settled(&known);
    }

    #[tokio::test]
    async fn a_rotation_that_ends_anywhere_is_finished_or_undone_at_the_next_start() {
        type Until = fn(&Files);
        let stages: [(&str, bool, bool, Until); 4] = [
            ("half a key is kept", false, false, |files| {
                create_key_file(&files.next, &SigningKey::generate_pkcs8().unwrap()[..20]).unwrap();
            }),
            ("the next key is kept", false, false, |files| drop(files.next_key().unwrap())),
            ("it is in the log", true, true, |_| {}),
            ("it is renamed", true, true, |files| files.replace().unwrap()),
        ];
        for (name, hands_over, is_finished, until) in stages {
            let place = Place::new();
            let (log, keys) = place.open();
            let mut known = log.verifying_keys();
            if hands_over {
                let next = place.files.next_key().unwrap();
                known.push(log.rotate_key(next).await.unwrap().0);
            }
            until(&place.files);
            // Ended without a word, as a kill ends it: no shutdown record.
            drop((log, keys));
            for _ in 0..2 {
                let (log, _keys) = place.open();
                assert_eq!(log.verifying_keys().len(), if is_finished { 2 } else { 1 }, "{name}");
                place.is_settled(&known);
            }
        }
    }

    #[tokio::test]
    async fn what_an_earlier_rotation_left_is_done_by_the_next() {
        let place = Place::new();
        let (log, keys) = place.open();
        let mut known = log.verifying_keys();
        // The answer came, and then neither file could be written.
        known.push(log.rotate_key(place.files.next_key().unwrap()).await.unwrap().0);
        let rotated = keys.rotate().await.unwrap();
        known.push(VerifyingKey::parse(&rotated.info.public_key).unwrap());
        place.is_settled(&known);

        // No answer came, and no handover: the same key is tried again.
        let waiting = place.files.next_key().unwrap().verifying_key();
        assert_eq!(keys.rotate().await.unwrap().info, info(&waiting, true));
        known.push(waiting);
        place.is_settled(&known);
    }

    #[tokio::test]
    async fn whoever_asked_may_go_away() {
        let place = Place::new();
        let (log, keys) = place.open();
        assert!(keys.rotate().now_or_never().is_none());
        keys.rotate().await.unwrap();
        assert_eq!(log.verifying_keys().len(), 3);
        place.is_settled(&log.verifying_keys());
    }

    #[tokio::test]
    async fn a_log_that_takes_no_handover_keeps_its_key() {
        let place = Place::new();
        let (log, keys) = place.open();
        let known = log.verifying_keys();
        log.close().await.unwrap();
        assert_eq!(keys.rotate().await.unwrap_err().reason(), Reason::Unavailable);
        assert!(place.files.next.exists(), "it may be needed as long as it is not certain");
        drop((log, keys));
        drop(place.open());
        place.is_settled(&known);
    }

    #[tokio::test]
    async fn a_key_that_handed_over_opens_nothing() {
        let place = Place::new();
        let (log, keys) = place.open();
        let (key, public) =
            (std::fs::read(&place.files.key).unwrap(), std::fs::read(&place.files.public).unwrap());
        keys.rotate().await.unwrap();
        log.close().await.unwrap();
        drop((log, keys));
        std::fs::remove_file(&place.files.key).unwrap();
        create_key_file(&place.files.key, &key).unwrap();
        assert!(place.refusal().contains("put the right audit.key back"), "{}", place.refusal());
        std::fs::write(&place.files.public, public).unwrap();
        let refusal = place.refusal();
        assert!(refusal.contains("audit.key: it handed over to key "), "{refusal}");
    }

    #[tokio::test]
    async fn a_key_that_a_damaged_log_may_need_stays() {
        let place = Place::new();
        let (log, keys) = place.open();
        log.rotate_key(place.files.next_key().unwrap()).await.unwrap();
        drop((log, keys));
        let segment = place.audit().join("a/00000000000000000001.jsonl");
        let good = std::fs::read_to_string(&segment).unwrap();
        std::fs::write(&segment, good.replace("next_signature\":\"", "next_signature\":\"A")).unwrap();
        let _ = place.refusal();
        assert!(place.files.next.exists());
        std::fs::write(&segment, good).unwrap();
        let (log, _keys) = place.open();
        place.is_settled(&log.verifying_keys());
    }

    #[tokio::test]
    async fn a_strange_public_key_is_not_overwritten() {
        let place = Place::new();
        place.open().0.close().await.unwrap();
        let stranger = SigningKey::from_pkcs8(&SigningKey::generate_pkcs8().unwrap()).unwrap();
        for text in [format!("{}\n", stranger.verifying_key()), "x\n".to_owned(), String::new()] {
            std::fs::write(&place.files.public, &text).unwrap();
            assert!(place.refusal().contains("audit.pub"), "{}", place.refusal());
            assert_eq!(std::fs::read_to_string(&place.files.public).unwrap(), text);
        }
    }
}
