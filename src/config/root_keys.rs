//! The root keys as the configuration names them, and how one gives way to the next.
//!
//! A key that is in a file `F` is rotated so; each line is on the disk before the next one begins:
//!
//! ```text
//! F     F.next   F.retired-<id>
//! old
//! old   new                       made as F.unfinished, synced, renamed
//! old   new                       everything that was under `old` is under `new`, looked at twice: the sealed store's own
//!                                 record first, which puts `new` in force, then the values, the state key last
//! old   new      old              a copy, made in the same way
//! new            old              F.next renamed over F
//! ```
//!
//! INVARIANT: at every instant `F` and `F.next` hold every key that something is under, and a start loads both. So it
//! succeeds wherever the one before was ended, and asking again goes on from there. `F.unfinished` was never used.
//!
//! INVARIANT: nothing is under the newest key while the store's own record is under another. Whoever brings an older
//! record back would have new values sealed under a key that was given up; a start refuses it.
//!
//! A key from a systemd credential or a variable is not the broker's to make: the new one is given as `root_key`, the
//! earlier one under `root_key.previous` until everything is under the new one.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::RootKeyChoice;
use super::assembly::{ReadVariable, StartError};
use super::state::{self, StateError};
use crate::broker::BrokerError;
use crate::broker::keys::{RootKeyInfo, RootKeyProgress, RootKeyRotated, RootKeys};
use crate::crypto::{CryptoError, KeyError, KeyProblem, KeyRing, RootKey, RootKeyId, RootKeySource};
use crate::error::{Reason, Reasoned};
use crate::kv::Kv;
use crate::store::StoreError;
use crate::store::sealed::{Rewrapped, Sealed};

/// How long whoever asks for the status is kept waiting while everything is counted: less than a call may take. A hundred
/// thousand small values take a second or two; of the largest size they are 6 GiB, which a slow disk may not give by then.
const COUNT_WITHIN: Duration = Duration::from_secs(20);

/// How many keys each root key wraps.
type Wraps = HashMap<RootKeyId, u64>;

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
    let key = read(choice, fresh, variable, warnings)?;
    let mut origins = vec![(key.id(), origin(choice))];
    let mut ring = KeyRing::of(key);
    for choice in previous {
        let key = read(choice, false, variable, warnings)?;
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
        Rotation {
            ring,
            origins: Mutex::new(origins),
            file,
            kv,
            sealed,
            count: tokio::sync::Mutex::default(),
        }
    }

    /// Says of a state key that none of these opens where the key for it is: another broker may have shared the file of
    /// the root key, and rotated it.
    pub(super) fn explain(&self, error: StateError) -> StartError {
        let (Some(file), StateError::Key(CryptoError::WrongKey { sealed_under, .. })) = (&self.file, &error)
        else {
            return error.into();
        };
        let retired = file.retired(*sealed_under);
        if !retired.exists() {
            return error.into();
        }
        let message = format!(
            "{error}; {path} is that key, given up by a rotation, maybe of another broker with the same {file}: name \
             it under root_key.previous, start, and run `claviger key rotate`",
            path = retired.display(),
            file = file.0.display(),
        );
        StoreError::WrongKey(message).into()
    }
}

/// Reads one key, and says what is to be warned of, once. `may_be_made`: nothing is under it yet.
fn read(
    choice: &RootKeyChoice,
    may_be_made: bool,
    variable: ReadVariable<'_>,
    warnings: &mut Vec<String>,
) -> Result<RootKey, StartError> {
    let loaded = RootKey::load(&source(choice, variable)?);
    let (key, warning) =
        loaded.map_err(|error| if may_be_made { error.into() } else { to_be_restored(&error) })?;
    for warning in warning.into_iter().chain(key.shortfalls().iter().cloned()) {
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    Ok(key)
}

/// Something is sealed under this key: to make another one in its place, as what is wrong with it may suggest, would be
/// of no use.
fn to_be_restored(error: &KeyError) -> StartError {
    let problem = match error.problem() {
        KeyProblem::Missing => "does not exist; correct the path, or".to_owned(),
        KeyProblem::Empty => "is empty;".to_owned(),
        KeyProblem::Placeholder => "repeats one byte, so it is not the key;".to_owned(),
        problem @ (KeyProblem::Length(_) | KeyProblem::NotHex { .. } | KeyProblem::Text) => {
            format!("{problem};")
        }
        _ => return error.clone().into(),
    };
    StartError::NoKey(format!(
        "{}: {problem} restore the copy of the key: what is sealed under it is lost without it, and a new key opens \
         nothing of it",
        error.origin()
    ))
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
                    "environment variable `{}` is not set; set it to the root key's 64 hex digits",
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
            Err(error) => Err(to_be_restored(&error)),
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
    /// The one count under way, or what came of it while nobody waited.
    count: tokio::sync::Mutex<JoinSet<Result<Wraps, BrokerError>>>,
}

#[async_trait]
impl RootKeys for Rotation {
    async fn status(&self) -> Result<Vec<RootKeyInfo>, BrokerError> {
        self.status_within(COUNT_WITHIN).await
    }

    async fn rotate(
        &self,
        rewrap_only: bool,
        progress: &watch::Sender<RootKeyProgress>,
    ) -> Result<RootKeyRotated, BrokerError> {
        self.prepare(rewrap_only).await?;
        let newest = self.ring.newest().id();
        let before = self.wrapped().await?;
        if self.file.is_none() && !rewrap_only && under_others(&before, newest) == 0 {
            return Err(self.needs_another(newest));
        }
        let counts = self.rewrap(before.values().sum(), progress).await?;
        let left = under_others(&self.wrapped().await?, newest);
        if left > 0 {
            let message = format!(
                "{left} keys are under earlier root keys, because they were changed meanwhile; ask again"
            );
            return Err(conflict(message));
        }
        let retired = self.give_way(newest).await?;
        // What was counted while nobody waited is no longer so.
        if let Ok(mut count) = self.count.try_lock() {
            *count = JoinSet::new();
        }
        Ok(RootKeyRotated { id: newest.to_string(), counts, retired })
    }
}

impl Rotation {
    /// A line to warn of, where the newest key is not in force. Then everything is looked at.
    ///
    /// # Errors
    /// [`Reason::Tampered`] where something is under the newest key all the same.
    pub(super) async fn reminder(&self) -> Result<Option<String>, StartError> {
        let (in_force, newest) = (self.sealed.root_key_in_force().await?, self.ring.newest().id());
        if in_force == newest {
            return Ok(None);
        }
        let ahead = self.wrapped().await?.get(&newest).copied().unwrap_or_default();
        if ahead > 0 {
            return Err(self.brought_back(in_force, newest, ahead).into());
        }
        Ok(Some(format!(
            "root key {newest} ({}) is not in force yet; run `claviger key rotate`, and keep the earlier one until that \
             is done",
            self.origin(newest)
        )))
    }

    fn brought_back(&self, in_force: RootKeyId, newest: RootKeyId, ahead: u64) -> BrokerError {
        let message = format!(
            "the sealed store's own record, `sealed/meta`, is under root key {in_force} ({}), but {ahead} keys are under \
             {newest} ({}) already, which a rotation wraps after that record: it was brought back from the past; restore \
             the database. Where the keys were exchanged in the configuration before a rotation was through, exchange \
             them again and finish that",
            self.origin(in_force),
            self.origin(newest)
        );
        BrokerError::Rejected { reason: Reason::Tampered, message }
    }

    /// Where the key is not the broker's to make, and no newer one is given.
    fn needs_another(&self, newest: RootKeyId) -> BrokerError {
        let done = match self.ring.ids().len() {
            0 | 1 => "",
            _ => {
                ". What root_key.previous names now can go: nothing is under it; keep it for backups made until then"
            }
        };
        conflict(format!(
            "nothing was changed: everything is under root key {newest} ({}), which is not the broker's to exchange. Put \
             a new key where root_key has this one, and this one under root_key.previous; restart the broker, and run \
             `claviger key rotate` again{done}",
            self.origin(newest)
        ))
    }

    async fn status_within(&self, longest: Duration) -> Result<Vec<RootKeyInfo>, BrokerError> {
        let counted = tokio::time::timeout(longest, self.counted()).await;
        let wrapped = counted.unwrap_or_else(|_| Err(not_counted(longest)))?;
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

    /// What [`wrapped`] gives, from a walk that goes on where its caller does not wait for the end, and whose outcome is
    /// the next caller's. An older outcome errs to the safe side alone: nothing comes under a key that was given up.
    async fn counted(&self) -> Result<Wraps, BrokerError> {
        let mut count = self.count.lock().await;
        if count.is_empty() {
            let (kv, sealed) = (Arc::clone(&self.kv), Arc::clone(&self.sealed));
            count.spawn(async move { wrapped(kv.as_ref(), &sealed).await });
        }
        let counted = count.join_next().await.and_then(Result::ok);
        counted.unwrap_or_else(|| {
            let message = "counting what each root key wraps ended early; ask again".to_owned();
            Err(BrokerError::Rejected { reason: Reason::Internal, message })
        })
    }

    async fn wrapped(&self) -> Result<Wraps, BrokerError> {
        wrapped(self.kv.as_ref(), &self.sealed).await
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

    /// Wraps everything in the store by the newest key, and the state key last; `expected` are as many as that is. Says
    /// how far it is a hundred times, or after each page.
    async fn rewrap(
        &self,
        expected: u64,
        progress: &watch::Sender<RootKeyProgress>,
    ) -> Result<RootKeyProgress, BrokerError> {
        let counts = |so_far: Rewrapped| RootKeyProgress {
            done: so_far.done,
            total: expected.max(so_far.done),
            rewrapped: so_far.changed,
        };
        let mut next = 0;
        let mut tell = |so_far: Rewrapped| {
            if so_far.done >= next {
                next = so_far.done + expected / 100;
                progress.send_replace(counts(so_far));
            }
        };
        tell(Rewrapped::default());
        let mut all = self.sealed.rewrap(&mut tell).await?;
        let of_state = state::rewrap(self.kv.as_ref(), &self.ring).await.map_err(|error| rejected(&error))?;
        all.done += 1;
        all.changed += u64::from(of_state);
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

/// How many keys each root key wraps. Reads all that is wrapped.
async fn wrapped(kv: &dyn Kv, sealed: &Sealed) -> Result<Wraps, BrokerError> {
    let mut wrapped = sealed.wrapped().await?;
    let of_state = state::wrapped_by(kv).await.map_err(|error| rejected(&error))?;
    *wrapped.entry(of_state).or_default() += 1;
    Ok(wrapped)
}

fn under_others(wrapped: &Wraps, newest: RootKeyId) -> u64 {
    wrapped.iter().filter(|(id, _)| **id != newest).map(|(_, count)| count).sum()
}

fn not_counted(within: Duration) -> BrokerError {
    let message = format!(
        "what each root key wraps could not be counted within {within:?}; the counting goes on, ask again for what comes \
         of it"
    );
    BrokerError::Rejected { reason: Reason::Unavailable, message }
}

fn conflict(message: String) -> BrokerError {
    BrokerError::Rejected { reason: Reason::Conflict, message }
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
    use crate::kv::{Entry, Transaction, Write};
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
            state::key(self.kv.as_ref(), &ring).await.map_err(|error| loaded.explain(error))?;
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

    /// Puts back, as they were, those of these rows that `fits` names by their keys.
    async fn put_back(machine: &Machine, rows: &[Entry], fits: impl Fn(&[u8]) -> bool) {
        let rows = rows.iter().filter(|row| fits(&row.key));
        let write: Vec<_> = rows.map(|row| Write::put(row.key.clone(), row.value.clone())).collect();
        assert!(!write.is_empty());
        machine.kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
    }

    async fn rows(machine: &Machine) -> Vec<Entry> {
        machine.kv.range(b"", &[], 1_000).await.unwrap().entries
    }

    const META: &[u8] = b"sealed/meta";
    const STATE: &[u8] = b"state/key";

    /// How far the rewrapping may have come: the store's own record, the values one after the other, the state key.
    const REWRAPPED: [&str; 4] = ["the store's own record", "a value", "all values", "the state key"];

    /// Wraps so much of it by the newest key.
    async fn rewrapped_until(step: &str, machine: &Machine, started: &Started) {
        let before = rows(machine).await;
        started.sealed.rewrap(&mut |_| {}).await.unwrap();
        let is_value = |key: &[u8]| key.starts_with(b"sealed/v/");
        let first = before.iter().find(|row| is_value(&row.key)).unwrap().key.clone();
        match step {
            "the store's own record" => put_back(machine, &before, is_value).await,
            "a value" => put_back(machine, &before, |key| is_value(key) && key != first).await,
            "all values" => {}
            _ => assert!(state::rewrap(machine.kv.as_ref(), &started.rotation.ring).await.unwrap()),
        }
    }

    const STEPS: usize = 7;

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
            rewrapped_until(REWRAPPED[(step - 2).min(3)], machine, &started).await;
        }
        if step == 6 {
            let before = file.load().unwrap();
            file.keep(&before, &file.retired(before.id())).unwrap();
        }
        if step == STEPS {
            file.give_way(newest).unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_rotation_that_was_ended_at_any_step_is_gone_on_with() {
        for step in 0..=STEPS {
            let machine = Machine::new().await;
            let old = machine.file().load().unwrap().id();
            ended_after(step, &machine).await;
            let next = machine.file().load_next().unwrap().map(|key| key.id());

            let started = machine.start().await;
            started.reads_all().await;
            let warned = started.warnings.iter().any(|warning| warning.contains("was not finished"));
            assert_eq!(warned, next.is_some(), "step {step}: {:?}", started.warnings);
            let rotated = started.rotate(step == STEPS).await.unwrap();
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
        let error = started.rotate(false).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Conflict, "{error}");
        assert!(error.to_string().contains("root_key.previous names now can go"), "{error}");

        let started = machine.start_with(&choice, &[], false, &variable).await.unwrap();
        started.reads_all().await;
        assert!(!started.warnings.iter().any(|warning| warning.contains("rotate")), "{:?}", started.warnings);
        let before = rows(&machine).await;
        let error = started.rotate(false).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Conflict, "{error}");
        let text = error.to_string();
        for part in
            ["nothing was changed", "environment variable NEW_KEY", "under root_key.previous", "restart"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("can go") && !text.contains('\n'), "{text}");
        assert!(rows(&machine).await == before, "nothing is changed");
        let rotated = started.rotate(true).await.unwrap();
        assert_eq!((rotated.counts.done, rotated.counts.rewrapped, rotated.retired), (WRAPPED, 0, None));
        assert_eq!(machine.start_fresh(false).await.err().unwrap().reason(), Reason::WrongKey);
    }

    #[tokio::test]
    async fn a_rotation_to_a_given_key_that_was_ended_anywhere_is_never_taken_for_tampering() {
        let (choice, variable) = given("5a");
        for step in REWRAPPED {
            let machine = Machine::new().await;
            let previous = [RootKeyChoice::File(machine.file().0)];
            let started = machine.start_with(&choice, &previous, false, &variable).await.unwrap();
            rewrapped_until(step, &machine, &started).await;
            let started = machine.start_with(&choice, &previous, false, &variable).await.expect(step);
            started.reads_all().await;
            let status = started.rotation.status().await.unwrap();
            assert!(status[0].in_force && status[0].wrapped > 0, "{step}: {status:?}");
            // A third key may be given before the second one is through.
            let (third, both) = given("a5");
            let both = |name: &str| variable(name).or_else(|| both(name));
            let previous = [previous[0].clone(), choice.clone()];
            let started = machine.start_with(&third, &previous, false, &both).await.expect(step);
            assert_eq!(started.rotate(false).await.unwrap().counts.rewrapped, WRAPPED, "{step}");
            let started = machine.start_with(&third, &[], false, &both).await.expect(step);
            started.reads_all().await;
        }
    }

    /// A key in a variable that is named after it.
    fn given(byte: &str) -> (RootKeyChoice, impl Fn(&str) -> Option<Zeroizing<String>> + Sync) {
        let (name, hex) = (format!("KEY_{byte}"), byte.repeat(31) + "00");
        let choice = RootKeyChoice::Environment(name.clone());
        (choice, move |asked: &str| (asked == name).then(|| Zeroizing::new(hex.clone())))
    }

    #[tokio::test]
    async fn a_record_of_the_store_from_before_a_rotation_is_refused() {
        // With the state key, or without it: the values tell as well.
        for rows_from_the_past in [&[META][..], &[META, STATE]] {
            let machine = Machine::new().await;
            let before = rows(&machine).await;
            let started = machine.start().await;
            let rotated = started.rotate(false).await.unwrap();
            let retired = RootKeyChoice::File(rotated.retired.unwrap().into());
            let current = RootKeyChoice::File(machine.file().0);
            let no_variable = |_: &str| -> Option<Zeroizing<String>> { None };
            let start = || machine.start_with(&current, std::slice::from_ref(&retired), false, &no_variable);
            let after = rows(&machine).await;
            start().await.unwrap();

            put_back(&machine, &before, |key| rows_from_the_past.contains(&key)).await;
            let error = start().await.err().unwrap();
            assert_eq!(error.reason(), Reason::Tampered, "{error}");
            let text = error.to_string();
            assert!(text.contains("`sealed/meta`") && text.contains(&rotated.id), "{text}");
            put_back(&machine, &after, |key| rows_from_the_past.contains(&key)).await;
            start().await.unwrap().reads_all().await;

            // All of it from before is a backup that was restored, not a forgery.
            put_back(&machine, &before, |_| true).await;
            let started = start().await.unwrap();
            assert!(started.warnings.iter().any(|warning| warning.contains("is not in force yet")));
            started.reads_all().await;
        }
    }

    #[tokio::test]
    async fn who_shares_a_key_file_with_another_broker_is_told_where_the_key_went() {
        let machine = Machine::new().await;
        let rotated = {
            // What another broker leaves behind, which has the same file and a store of its own.
            let file = machine.file();
            let next = file.make_next().unwrap();
            file.give_way(next.id()).unwrap().unwrap().1
        };
        let error = machine.start_fresh(false).await.err().unwrap();
        assert_eq!(error.reason(), Reason::WrongKey, "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("{} is that key", rotated.display())), "{text}");
        let choice = RootKeyChoice::File(machine.file().0);
        let previous = [RootKeyChoice::File(rotated.clone())];
        let started = machine.start_with(&choice, &previous, false, &|_| None).await.unwrap();
        started.reads_all().await;
        assert_eq!(started.rotate(false).await.unwrap().counts.rewrapped, WRAPPED);

        std::fs::remove_file(&rotated).unwrap();
        machine.start().await.reads_all().await;
        RootKey::generate().unwrap().create_file(&machine.file().next()).unwrap();
        std::fs::rename(machine.file().next(), machine.file().0).unwrap();
        let text = machine.start_fresh(false).await.err().unwrap().to_string();
        assert!(!text.contains("is that key"), "what is not there is not named: {text}");
    }

    #[tokio::test]
    async fn a_lost_key_is_to_be_restored_where_something_is_under_it_and_made_where_nothing_is() {
        let machine = Machine::new().await;
        let path = machine.file().0;
        let good = std::fs::read(&path).unwrap();
        let mut said = Vec::new();
        for content in
            [None, Some(""), Some("\n"), Some("short"), Some(&*"0".repeat(64)), Some(&*"x".repeat(64))]
        {
            std::fs::remove_file(&path).unwrap();
            if let Some(content) = content {
                crate::crypto::create_key_file(&path, content.as_bytes()).unwrap();
            }
            let error = machine.start_fresh(false).await.err().unwrap();
            assert_eq!(error.reason(), Reason::InvalidKey, "{content:?}: {error}");
            let text = error.to_string();
            assert!(text.starts_with("key file `") && text.contains("restore the copy of the key"), "{text}");
            assert!(!text.contains("create") && !text.contains('\n'), "{text}");
            if content.is_some() {
                said.push(machine.start_fresh(true).await.err().unwrap().to_string());
            } else {
                std::fs::write(&path, "").unwrap();
            }
        }
        assert!(said[0].contains("is empty; remove it and create the key anew"), "{said:?}");
        assert!(said.iter().all(|text| !text.contains("restore")), "{said:?}");
        std::fs::write(&path, &good).unwrap();
        machine.start().await.reads_all().await;

        let previous = [RootKeyChoice::File(path.with_file_name("earlier.key"))];
        let choice = RootKeyChoice::File(path);
        let error = machine.start_with(&choice, &previous, true, &|_| None).await.err().unwrap();
        assert!(error.to_string().contains("restore the copy"), "an earlier key is never made: {error}");
    }

    #[tokio::test]
    async fn a_count_that_takes_too_long_goes_on_and_is_the_next_answer() {
        const MOMENT: Duration = Duration::from_millis(1);
        const HUNG: Duration = Duration::from_secs(60);
        let machine = Machine::new().await;
        let started = machine.start().await;
        let rotation = &started.rotation;
        let newest = rotation.ring.newest().id();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        rotation.count.lock().await.spawn(async move {
            ended.await.unwrap();
            Ok(Wraps::from([(newest, 77)]))
        });
        for _ in 0..2 {
            let error = rotation.status_within(MOMENT).await.unwrap_err();
            assert_eq!(error.reason(), Reason::Unavailable, "{error}");
            assert!(error.to_string().contains("ask again"), "{error}");
        }
        end.send(()).unwrap();
        assert_eq!(rotation.status_within(HUNG).await.unwrap()[0].wrapped, 77);
        assert_eq!(rotation.status_within(HUNG).await.unwrap()[0].wrapped, WRAPPED, "counted anew");

        rotation.count.lock().await.spawn(async move { Ok(Wraps::from([(newest, 78)])) });
        started.rotate(false).await.unwrap();
        let status = rotation.status_within(HUNG).await.unwrap();
        assert_eq!((status[0].wrapped, status[1].wrapped), (WRAPPED, 0), "a rotation leaves no count behind");
    }
}
