//! The root keys as the configuration names them, and how one gives way to the next.
//!
//! A key that is in a file `F` is rotated so; each line is on the disk before the next one begins:
//!
//! ```text
//! F     F.next   F.retired-<id>
//! old
//! old   new                       made as F.unfinished, synced, renamed
//! old   new                       everything that was under `old` is under `new`, looked at twice
//! old   new      old              a copy, made in the same way
//! new            old              F.next renamed over F
//! ```
//!
//! INVARIANT: at every instant `F` and `F.next` hold every key that something is under, and a start loads both. So it
//! succeeds wherever the one before was ended, and asking again goes on from there. `F.unfinished` was never used.
//!
//! A key from a systemd credential or a variable is not the broker's to make: the new one is given as `root_key`, the
//! earlier one under `root_key.previous` until everything is under the new one.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::assembly::{ReadVariable, StartError};
use super::{RootKeyChoice, state};
use crate::broker::BrokerError;
use crate::broker::keys::{RootKeyInfo, RootKeyProgress, RootKeyRotated, RootKeys};
use crate::crypto::{KeyError, KeyProblem, KeyRing, RootKey, RootKeyId, RootKeySource};
use crate::error::{Reason, Reasoned};
use crate::kv::Kv;
use crate::store::StoreError;
use crate::store::sealed::{Rewrapped, Sealed};

/// The keys that the configuration names, and the one that a rotation was ended with.
pub(super) struct Loaded {
    /// The key of `root_key` is the newest, unless a rotation has made another.
    pub(super) ring: Arc<KeyRing>,
    origins: Vec<(RootKeyId, String)>,
    file: Option<KeyFile>,
}

/// Loads them. `fresh`: the key-value store holds nothing yet, so that a key file that is missing may be made.
pub(super) fn load(
    choice: &RootKeyChoice,
    previous: &[RootKeyChoice],
    fresh: bool,
    variable: ReadVariable<'_>,
    warnings: &mut Vec<String>,
) -> Result<Loaded, StartError> {
    let file = KeyFile::of(choice);
    // Made only for a store that holds nothing yet: a new key for old data would lock everyone out.
    if let Some(file) = file.as_ref().filter(|file| fresh && !file.0.exists()) {
        RootKey::generate()?.create_file(&file.0)?;
        warnings.push(format!(
            "made a new root key in {}; keep a copy elsewhere, without it every sealed value is lost",
            file.0.display()
        ));
    }
    let key = read(choice, variable, warnings)?;
    let mut origins = vec![(key.id(), origin(choice))];
    let mut ring = KeyRing::of(key);
    for choice in previous {
        let key = read(choice, variable, warnings)?;
        origins.push((key.id(), origin(choice)));
        ring = ring.with(key);
    }
    if let Some(file) = &file
        && let Some(next) = file.load_next()?
    {
        warnings.push(format!(
            "a rotation of the root key was not finished: {} and {} are both needed; run `claviger key rotate`",
            file.0.display(),
            file.next().display()
        ));
        origins.push((next.id(), in_file(&file.next())));
        ring.adopt(next);
    }
    Ok(Loaded { ring: Arc::new(ring), origins, file })
}

impl Loaded {
    /// What rotates these keys, once the store is open.
    pub(super) fn rotation(self, kv: Arc<dyn Kv>, sealed: Arc<Sealed>) -> Rotation {
        let Self { ring, origins, file } = self;
        Rotation { ring, origins: Mutex::new(origins), file, kv, sealed }
    }
}

/// Reads one key, and says what is to be warned of, once.
fn read(
    choice: &RootKeyChoice,
    variable: ReadVariable<'_>,
    warnings: &mut Vec<String>,
) -> Result<RootKey, StartError> {
    let (key, warning) = RootKey::load(&source(choice, variable)?)?;
    for warning in warning.into_iter().chain(key.shortfalls().iter().cloned()) {
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    Ok(key)
}

fn source(choice: &RootKeyChoice, variable: ReadVariable<'_>) -> Result<RootKeySource, StartError> {
    match choice {
        RootKeyChoice::File(path) => Ok(RootKeySource::File(path.clone())),
        RootKeyChoice::SystemdCredential(name) => {
            let missing = || {
                StartError::NoKey("CREDENTIALS_DIRECTORY is not set; start under systemd with LoadCredential=, or set root_key.file".to_owned())
            };
            let directory = PathBuf::from(variable("CREDENTIALS_DIRECTORY").ok_or_else(missing)?.as_str());
            Ok(RootKeySource::SystemdCredential { directory, name: name.clone() })
        }
        RootKeyChoice::Environment(name) => {
            let missing = || {
                StartError::NoKey(format!(
                    "environment variable `{}` is not set; set it to 64 hex digits",
                    name.escape_default()
                ))
            };
            let value = variable(name).ok_or_else(missing)?;
            Ok(RootKeySource::EnvironmentValue { name: name.clone(), value })
        }
    }
}

fn origin(choice: &RootKeyChoice) -> String {
    match choice {
        RootKeyChoice::File(path) => in_file(path),
        RootKeyChoice::SystemdCredential(name) => format!("systemd credential {}", name.escape_default()),
        RootKeyChoice::Environment(name) => format!("environment variable {}", name.escape_default()),
    }
}

fn in_file(path: &Path) -> String {
    format!("file {}", path.display())
}

/// A root key's file, with the names beside it.
#[derive(Debug, Clone)]
struct KeyFile(PathBuf);

impl KeyFile {
    fn of(choice: &RootKeyChoice) -> Option<Self> {
        match choice {
            RootKeyChoice::File(path) => Some(Self(path.clone())),
            RootKeyChoice::SystemdCredential(_) | RootKeyChoice::Environment(_) => None,
        }
    }

    fn next(&self) -> PathBuf {
        self.beside(".next")
    }

    fn retired(&self, id: RootKeyId) -> PathBuf {
        self.beside(&format!(".retired-{id}"))
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.0.as_os_str().to_owned();
        name.push(suffix);
        name.into()
    }

    fn load(&self) -> Result<RootKey, KeyError> {
        Ok(RootKey::load(&RootKeySource::File(self.0.clone()))?.0)
    }

    /// The key that is to follow, its name on the disk; `None` where there is none.
    fn load_next(&self) -> Result<Option<RootKey>, StartError> {
        match RootKey::load(&RootKeySource::File(self.next())) {
            Ok((key, _)) => {
                // Whoever made it may have been ended before its name was there to stay.
                self.sync()?;
                Ok(Some(key))
            }
            Err(error) if *error.problem() == KeyProblem::Missing => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn make_next(&self) -> Result<RootKey, StartError> {
        let key = RootKey::generate()?;
        self.keep(&key, &self.next())?;
        Ok(key)
    }

    /// Puts a key into a file of its own. When this returns, it is on the disk; where it is ended before, there is no
    /// such file or all of it.
    fn keep(&self, key: &RootKey, at: &Path) -> Result<(), StartError> {
        let unfinished = self.beside(".unfinished");
        match std::fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&unfinished, &error)),
            _ => {}
        }
        key.create_file(&unfinished)?;
        std::fs::rename(&unfinished, at).map_err(|error| failed(at, &error))?;
        self.sync()
    }

    /// Whether the key that has this id is in one of the two files that a start loads.
    fn holds(&self, id: RootKeyId) -> Result<bool, StartError> {
        Ok(self.load()?.id() == id || self.load_next()?.is_some_and(|next| next.id() == id))
    }

    /// Puts the key that is to follow, `newest`, in the place of the one before; which that was, and where it is now.
    /// Nothing may be under any key but `newest` any more. `None` where there is nothing to do.
    fn give_way(&self, newest: RootKeyId) -> Result<Option<(RootKeyId, PathBuf)>, StartError> {
        let next = self.next();
        match self.load_next()? {
            None => return Ok(None),
            Some(found) if found.id() == newest => {}
            Some(_) => return Err(StartError::NoKey(changed_meanwhile(&next))),
        }
        let before = self.load()?;
        let retired = self.retired(before.id());
        self.keep(&before, &retired)?;
        std::fs::rename(&next, &self.0).map_err(|error| failed(&self.0, &error))?;
        self.sync()?;
        Ok(Some((before.id(), retired)))
    }

    /// Makes what was renamed in the file's folder stay so.
    fn sync(&self) -> Result<(), StartError> {
        let folder = self.0.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or_else(|| Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| failed(folder, &error))
    }
}

fn failed(path: &Path, error: &io::Error) -> StartError {
    let problem = format!(
        "{error}; let the broker write to the folder of its key file, or give it the new key as root_key and the \
         earlier one under root_key.previous"
    );
    StartError::Folder { path: path.display().to_string(), problem }
}

fn changed_meanwhile(path: &Path) -> String {
    format!("{} does not hold the key that it held a moment ago; put that back", path.display())
}

/// Rotates the root keys.
pub(super) struct Rotation {
    ring: Arc<KeyRing>,
    origins: Mutex<Vec<(RootKeyId, String)>>,
    file: Option<KeyFile>,
    kv: Arc<dyn Kv>,
    sealed: Arc<Sealed>,
}

#[async_trait]
impl RootKeys for Rotation {
    async fn status(&self) -> Result<Vec<RootKeyInfo>, BrokerError> {
        let wrapped = self.wrapped().await?;
        let in_force = self.sealed.root_key_in_force().await?;
        let mut ids = self.ring.ids();
        let strange = wrapped.keys().filter(|id| !ids.contains(id)).copied().collect::<Vec<_>>();
        ids.extend(strange);
        ids.sort_by_key(|id| *id != in_force);
        let info = |id: RootKeyId| RootKeyInfo {
            id: id.to_string(),
            origin: self.origin(id),
            wrapped: wrapped.get(&id).copied().unwrap_or_default(),
            in_force: id == in_force,
        };
        Ok(ids.into_iter().map(info).collect())
    }

    async fn rotate(
        &self,
        rewrap_only: bool,
        progress: &watch::Sender<RootKeyProgress>,
    ) -> Result<RootKeyRotated, BrokerError> {
        self.prepare(rewrap_only).await?;
        let newest = self.ring.newest().id();
        let counts = self.rewrap(progress).await?;
        let left: u64 =
            self.wrapped().await?.iter().filter(|(id, _)| **id != newest).map(|(_, count)| count).sum();
        if left > 0 {
            let message = format!(
                "{left} keys are under earlier root keys, because they were changed meanwhile; ask again"
            );
            return Err(BrokerError::Rejected { reason: Reason::Conflict, message });
        }
        let retired = self.give_way(newest).await?;
        Ok(RootKeyRotated { id: newest.to_string(), counts, retired })
    }
}

impl Rotation {
    /// A line to warn of, where the newest key is not in force.
    pub(super) async fn reminder(&self) -> Result<Option<String>, StoreError> {
        let (in_force, newest) = (self.sealed.root_key_in_force().await?, self.ring.newest().id());
        Ok((in_force != newest).then(|| {
            format!(
                "root key {newest} ({}) is not in force yet; run `claviger key rotate`, and keep the earlier one until \
                 that is done",
                self.origin(newest)
            )
        }))
    }

    /// How many keys each root key wraps.
    async fn wrapped(&self) -> Result<HashMap<RootKeyId, u64>, BrokerError> {
        let mut wrapped = self.sealed.wrapped().await?;
        let of_state = state::wrapped_by(self.kv.as_ref()).await.map_err(|error| rejected(&error))?;
        *wrapped.entry(of_state).or_default() += 1;
        Ok(wrapped)
    }

    /// Sees to it that there is a newest key that everything may be wrapped by: the one that a rotation was ended with,
    /// or one that is not in force yet, or a new one.
    async fn prepare(&self, rewrap_only: bool) -> Result<(), BrokerError> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        let in_force = self.sealed.root_key_in_force().await?;
        let make = !rewrap_only && in_force == self.ring.newest().id();
        let next = file.next();
        let key = off_the_reactor(move || match file.load_next()? {
            None if make => file.make_next().map(Some),
            found => Ok(found),
        })
        .await?;
        if let Some(key) = key {
            self.moved(key.id(), in_file(&next));
            self.ring.adopt(key);
        }
        self.durable().await
    }

    /// INVARIANT: nothing is wrapped by a key that the next start would not find.
    async fn durable(&self) -> Result<(), BrokerError> {
        let Some(file) = self.file.clone() else { return Ok(()) };
        let newest = self.ring.newest().id();
        let path = file.next();
        if off_the_reactor(move || file.holds(newest)).await? {
            return Ok(());
        }
        Err(rejected(&StartError::NoKey(changed_meanwhile(&path))))
    }

    /// Wraps the state key and everything in the store by the newest key. Says how far it is a hundred times, or after
    /// each page.
    async fn rewrap(
        &self,
        progress: &watch::Sender<RootKeyProgress>,
    ) -> Result<RootKeyProgress, BrokerError> {
        let expected: u64 = self.wrapped().await?.values().sum();
        let of_state = state::rewrap(self.kv.as_ref(), &self.ring).await.map_err(|error| rejected(&error))?;
        let counts = |so_far: Rewrapped| RootKeyProgress {
            done: so_far.done + 1,
            total: expected.max(so_far.done + 1),
            rewrapped: so_far.changed + u64::from(of_state),
        };
        let mut next = 0;
        let mut tell = |so_far: Rewrapped| {
            if so_far.done >= next {
                next = so_far.done + expected / 100;
                progress.send_replace(counts(so_far));
            }
        };
        tell(Rewrapped::default());
        let all = self.sealed.rewrap(&mut tell).await?;
        progress.send_replace(counts(all));
        Ok(counts(all))
    }

    async fn give_way(&self, newest: RootKeyId) -> Result<Option<String>, BrokerError> {
        let Some(file) = self.file.clone() else { return Ok(None) };
        let path = file.0.clone();
        let Some((before, retired)) = off_the_reactor(move || file.give_way(newest)).await? else {
            return Ok(None);
        };
        self.moved(newest, in_file(&path));
        self.moved(before, in_file(&retired));
        Ok(Some(retired.display().to_string()))
    }

    fn origin(&self, id: RootKeyId) -> String {
        let origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        let found = origins.iter().find(|(known, _)| *known == id);
        found.map_or_else(|| "nowhere: it is not loaded".to_owned(), |(_, origin)| origin.clone())
    }

    fn moved(&self, id: RootKeyId, to: String) {
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        origins.retain(|(known, _)| *known != id);
        origins.push((id, to));
    }
}

fn rejected(error: &impl Reasoned) -> BrokerError {
    BrokerError::Rejected { reason: error.reason(), message: error.to_string() }
}

/// Files are read and synced for as long as the disk takes.
async fn off_the_reactor<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StartError> + Send + 'static,
) -> Result<T, BrokerError> {
    let done = tokio::task::spawn_blocking(move || work().map_err(|error| rejected(&error))).await;
    done.unwrap_or_else(|error| {
        let message = format!("working on the key file failed: {error}");
        Err(BrokerError::Rejected { reason: Reason::Internal, message })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{ManualClock, SharedClock};
    use crate::kv::embedded::Embedded;
    use crate::secret::{SecretId, SecretValue, Selector, VersionId};
    use crate::store::{Freshness, Put, Store as _};
    use zeroize::Zeroizing;

    /// What outlives a process: the key-value store and the folder of the key file.
    struct Machine {
        folder: tempfile::TempDir,
        kv: Arc<dyn Kv>,
        clock: SharedClock,
    }

    /// What a start makes of it.
    struct Started {
        rotation: Rotation,
        sealed: Arc<Sealed>,
        warnings: Vec<String>,
    }

    impl Machine {
        /// With secrets under a key that is in its file.
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let clock: SharedClock = ManualClock::new("2026-03-01T12:00:00Z".parse().unwrap());
            let kv = Embedded::open(&folder.path().join("kv.db"), Arc::clone(&clock)).await.unwrap();
            let machine = Self { folder, kv: Arc::new(kv), clock };
            let started = machine.start_fresh(true).await.unwrap();
            for number in 0..SECRETS {
                let (value, token) =
                    (SecretValue::text(format!("value {number}")).unwrap(), VersionId::generate());
                let put = Put { value, token, labels: Vec::new(), expected: None };
                started.sealed.put(&secret(number), put).await.unwrap();
            }
            machine
        }

        fn file(&self) -> KeyFile {
            KeyFile(self.folder.path().join("root.key"))
        }

        async fn start(&self) -> Started {
            self.start_fresh(false).await.unwrap()
        }

        async fn start_fresh(&self, fresh: bool) -> Result<Started, StartError> {
            self.start_with(&RootKeyChoice::File(self.file().0), &[], fresh, &|_| None).await
        }

        async fn start_with(
            &self,
            choice: &RootKeyChoice,
            previous: &[RootKeyChoice],
            fresh: bool,
            variable: ReadVariable<'_>,
        ) -> Result<Started, StartError> {
            let mut warnings = Vec::new();
            let loaded = load(choice, previous, fresh, variable, &mut warnings)?;
            let ring = Arc::clone(&loaded.ring);
            state::key(self.kv.as_ref(), &ring).await?;
            let sealed = Arc::new(Sealed::open(Arc::clone(&self.kv), ring, Arc::clone(&self.clock)).await?);
            let rotation = loaded.rotation(Arc::clone(&self.kv), Arc::clone(&sealed));
            warnings.extend(rotation.reminder().await?);
            Ok(Started { rotation, sealed, warnings })
        }
    }

    impl Started {
        async fn reads_all(&self) {
            for number in 0..SECRETS {
                let got = self.sealed.get(&secret(number), &Selector::CURRENT, Freshness::Refresh).await;
                assert_eq!(got.unwrap().value.expose_text(), Some(format!("value {number}").as_str()));
            }
        }

        async fn rotate(&self, rewrap_only: bool) -> Result<RootKeyRotated, BrokerError> {
            self.rotation.rotate(rewrap_only, &watch::Sender::new(RootKeyProgress::default())).await
        }
    }

    const SECRETS: usize = 5;
    /// The store's own key and the state key are wrapped too.
    const WRAPPED: u64 = SECRETS as u64 + 2;

    fn secret(number: usize) -> SecretId {
        SecretId::parse("production", &format!("secret-{number}")).unwrap()
    }

    fn names(machine: &Machine) -> Vec<String> {
        let entries = std::fs::read_dir(machine.folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.starts_with("root.key"));
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_key_file_gives_way_to_a_new_one() {
        let machine = Machine::new().await;
        let started = machine.start().await;
        assert!(started.warnings.iter().all(|warning| !warning.contains("rotate")), "{:?}", started.warnings);
        let old = machine.file().load().unwrap().id();
        let (progress, seen) = watch::channel(RootKeyProgress::default());
        let rotated = started.rotation.rotate(false, &progress).await.unwrap();
        let counts = RootKeyProgress { done: WRAPPED, total: WRAPPED, rewrapped: WRAPPED };
        assert_eq!((rotated.counts, *seen.borrow()), (counts, counts));
        let retired = machine.file().retired(old);
        assert_eq!(rotated.retired.as_deref(), retired.to_str());
        assert_eq!(names(&machine), ["root.key".to_owned(), format!("root.key.retired-{old}")]);
        let new = machine.file().load().unwrap().id();
        assert_eq!((rotated.id, new == old), (new.to_string(), false));

        let status = started.rotation.status().await.unwrap();
        let shown: Vec<_> =
            status.iter().map(|key| (key.wrapped, key.in_force, key.origin.clone())).collect();
        let (file, retired) = (in_file(&machine.file().0), in_file(&retired));
        assert_eq!(shown, [(WRAPPED, true, file), (0, false, retired)]);
        started.reads_all().await;
        machine.start().await.reads_all().await;
    }

    /// What a rotation that is ended leaves behind, after each of its steps.
    async fn ended_after(step: usize, machine: &Machine) {
        let (file, started) = (machine.file(), machine.start().await);
        if step == 0 {
            return std::fs::write(file.beside(".unfinished"), "0123").unwrap();
        }
        let next = file.make_next().unwrap();
        let newest = next.id();
        if step >= 2 {
            started.rotation.ring.adopt(next);
            state::rewrap(machine.kv.as_ref(), &started.rotation.ring).await.unwrap();
        }
        if step >= 3 {
            started.sealed.rewrap(&mut |_| {}).await.unwrap();
        }
        if step == 4 {
            let before = file.load().unwrap();
            file.keep(&before, &file.retired(before.id())).unwrap();
        }
        if step == 5 {
            file.give_way(newest).unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_rotation_that_was_ended_at_any_step_is_gone_on_with() {
        for step in 0..=5 {
            let machine = Machine::new().await;
            let old = machine.file().load().unwrap().id();
            ended_after(step, &machine).await;
            let next = machine.file().load_next().unwrap().map(|key| key.id());

            let started = machine.start().await;
            started.reads_all().await;
            let warned = started.warnings.iter().any(|warning| warning.contains("was not finished"));
            assert_eq!(warned, next.is_some(), "step {step}: {:?}", started.warnings);
            let rotated = started.rotate(step == 5).await.unwrap();
            if let Some(next) = next {
                assert_eq!(rotated.id, next.to_string(), "step {step}: no third key is made");
            }
            started.reads_all().await;
            let file = machine.file().load().unwrap().id();
            assert_eq!(rotated.id, file.to_string(), "step {step}");
            assert_eq!(
                names(&machine),
                ["root.key".to_owned(), format!("root.key.retired-{old}")],
                "step {step}"
            );
            let status = started.rotation.status().await.unwrap();
            assert_eq!((status[0].wrapped, status[0].id == rotated.id), (WRAPPED, true), "step {step}");
            machine.start().await.reads_all().await;
        }
    }

    #[tokio::test]
    async fn a_key_that_is_not_on_the_disk_wraps_nothing() {
        let machine = Machine::new().await;
        let started = machine.start().await;
        started.rotation.ring.adopt(RootKey::generate().unwrap());
        for rewrap_only in [true, false] {
            let error = started.rotate(rewrap_only).await.unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidKey, "{error}");
        }
        let status = started.rotation.status().await.unwrap();
        assert_eq!((status[0].wrapped, status[1].wrapped), (WRAPPED, 0));
        machine.start().await.reads_all().await;
    }

    #[tokio::test]
    async fn a_key_that_the_broker_can_not_make_is_given_with_the_one_before() {
        let machine = Machine::new().await;
        let before = RootKeyChoice::File(machine.file().0);
        let hex = "5a".repeat(31) + "00";
        let variable = |name: &str| (name == "NEW_KEY").then(|| Zeroizing::new(hex.clone()));
        let choice = RootKeyChoice::Environment("NEW_KEY".to_owned());
        let alone = machine.start_with(&choice, &[], false, &variable).await.err().unwrap();
        assert_eq!(alone.reason(), Reason::WrongKey);
        assert!(alone.to_string().contains("under root_key.previous"), "{alone}");

        let previous = [before];
        let started = machine.start_with(&choice, &previous, false, &variable).await.unwrap();
        assert!(started.warnings.iter().any(|warning| warning.contains("is not in force yet")));
        started.reads_all().await;
        let rotated = started.rotate(false).await.unwrap();
        assert_eq!((rotated.counts.rewrapped, rotated.retired), (WRAPPED, None));
        assert_eq!(names(&machine), ["root.key"], "no file is made or moved");
        assert_eq!(started.rotate(false).await.unwrap().counts.rewrapped, 0);

        let started = machine.start_with(&choice, &[], false, &variable).await.unwrap();
        started.reads_all().await;
        assert!(!started.warnings.iter().any(|warning| warning.contains("rotate")), "{:?}", started.warnings);
        assert_eq!(machine.start_fresh(false).await.err().unwrap().reason(), Reason::WrongKey);
    }
}
