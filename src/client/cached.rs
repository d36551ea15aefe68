//! Secrets at hand: their values without a question, kept fresh by a watch.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::answers::ToReference;
use super::calls::Client;
use super::error::ClientError;
use super::keeper::{Held, Keeper, Slot};
use crate::secret::{FieldName, SecretId, SecretValue, VersionId};

impl Client {
    /// Keeps a secret at hand: its current version, told by the broker whenever it changes.
    ///
    /// Waits until the broker has told it for the first time. All secrets that a client keeps of one environment, at
    /// most 500, share one watch.
    ///
    /// ```no_run
    /// # use claviger::client::{Client, ClientError};
    /// # async fn example(client: &Client) -> Result<(), ClientError> {
    /// let mut database = client.cached("database").await?;
    /// let mut pool = connect(&database.field("password")?);
    /// loop {
    ///     // Rotated: log in with the new password, then say so.
    ///     let version = database.changed().await?;
    ///     pool = connect(&database.field("password")?);
    ///     database.report_in_use(&version).await?;
    /// }
    /// # }
    /// # fn connect(password: &claviger::secret::SecretValue) {}
    /// ```
    ///
    /// # Errors
    /// Why there is no value: [`Reason::Denied`](crate::error::Reason::Denied),
    /// [`Reason::SecretNotFound`](crate::error::Reason::SecretNotFound), or that the broker did not answer in time.
    /// Where the builder was told no consumer.
    pub async fn cached(&self, secret: impl ToReference) -> Result<Cached, ClientError> {
        let id = self.whole(secret)?;
        let keeper = self.keepers().of(&id.environment, self)?;
        let mut slot = keeper.shelf.subscribe(&id.name)?;
        let told = slot.wait_for(|slot| !matches!(slot, Slot::Waiting));
        // What was told is looked at below, in one place with what was not.
        let _ = tokio::time::timeout(self.session().timeout, told).await.map(drop);
        let cached = Cached { client: self.clone(), keeper, id, slot };
        cached.current()?;
        Ok(cached)
    }
}

/// A secret at hand; see [`Client::cached`]. Cheap to clone; each clone notices changes by itself.
///
/// While the broker is away the last value is served and said to be stale, for as long as the builder's
/// [`stale_for`](super::Builder::stale_for). A secret that is deleted, or denied to this program, is gone at once.
#[derive(Clone)]
pub struct Cached {
    client: Client,
    keeper: Arc<Keeper>,
    id: SecretId,
    slot: watch::Receiver<Slot>,
}

/// The current version of a secret, as it was known at one moment. Its value is wiped with its last owner.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Snapshot {
    /// The version.
    pub version_id: VersionId,
    /// The value.
    pub value: SecretValue,
    /// How long ago the broker last confirmed that this is the current version.
    pub age: Duration,
    /// The broker can't confirm it now: it, or its store, is out of reach.
    pub stale: bool,
}

impl Cached {
    /// The secret.
    #[must_use]
    pub const fn id(&self) -> &SecretId {
        &self.id
    }

    /// Its current version, from memory.
    ///
    /// # Errors
    /// [`Reason::Unavailable`](crate::error::Reason::Unavailable) where the broker has been away for longer than a
    /// value may be stale; what the broker said where it said no.
    pub fn current(&self) -> Result<Snapshot, ClientError> {
        match &*self.slot.borrow() {
            Slot::Held(held) => self.snapshot(held),
            Slot::Refused(error) => Err(error.clone()),
            Slot::Waiting => Err(self.unavailable("the broker has not told it yet")),
        }
    }

    /// One field of the current version, where its value is a JSON object.
    ///
    /// # Errors
    /// As [`current`](Self::current); [`Reason::FieldNotFound`](crate::error::Reason::FieldNotFound).
    pub fn field(&self, name: &str) -> Result<SecretValue, ClientError> {
        let name = FieldName::parse(name)?;
        Ok(self.current()?.value.field(&name)?)
    }

    /// Waits until something else is known of the secret than when this handle last waited: another version, or that
    /// there is none.
    ///
    /// # Errors
    /// As [`current`](Self::current), about what it is now.
    pub async fn changed(&mut self) -> Result<Snapshot, ClientError> {
        // It fails only where the slot is gone, and a slot is kept as long as it has a receiver: this one.
        self.slot.changed().await.map_err(|_| self.unavailable("it is not kept any more"))?;
        self.current()
    }

    /// Says that this program runs on that version now; the answer says whether that one is current.
    ///
    /// # Errors
    /// As [`Client::report_in_use`].
    pub async fn report_in_use(&self, snapshot: &Snapshot) -> Result<bool, ClientError> {
        self.client.report_in_use(&self.id, &snapshot.version_id).await
    }

    fn snapshot(&self, held: &Held) -> Result<Snapshot, ClientError> {
        let standing = self.keeper.shelf.standing(held);
        let bound = self.client.settings().stale_for;
        if standing.stale && standing.age > bound {
            let problem = format!(
                "the broker last confirmed it {:?} ago, and a value may be stale for {bound:?}",
                standing.age
            );
            return Err(self.unavailable(&problem));
        }
        let Held { version_id, value, .. } = held.clone();
        Ok(Snapshot { version_id, value, age: standing.age, stale: standing.stale })
    }

    fn unavailable(&self, problem: &str) -> ClientError {
        let why = self.keeper.shelf.trouble().map(|error| format!(": {}", error.message)).unwrap_or_default();
        ClientError::unavailable(format!("secret {}: {problem}{why}", self.id))
    }
}

impl fmt::Debug for Cached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached")
            .field("id", &self.id)
            .field("current", &self.current())
            .finish_non_exhaustive()
    }
}
