//! The broker's own keys: who may look at them and rotate them, and what is on record of it. The work itself is done by
//! those who loaded the keys: [`RootKeys`] and [`AuditKeys`].

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;

use super::{Broker, BrokerError, Call, record};
use crate::error::Reason;
use crate::policy::{Action, Resource};

/// A root key, without itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootKeyInfo {
    /// Its key check value, 32 hex digits.
    pub id: String,
    /// Where it was read from, for example `file /etc/claviger/root.key`.
    pub origin: String,
    /// How many keys it wraps: data keys, and those of the broker's own records.
    pub wrapped: u64,
    /// New values are under it.
    pub in_force: bool,
}

/// How far a rotation of the root key is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RootKeyProgress {
    /// How many wrapped keys were looked at.
    pub done: u64,
    /// How many there are. What is written meanwhile is not counted: it is under the newest root key anyway.
    pub total: u64,
    /// How many of them were wrapped anew.
    pub rewrapped: u64,
}

/// What a rotation of the root key did: nothing is under an earlier key any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootKeyRotated {
    /// The key in force.
    pub id: String,
    /// How many wrapped keys there are, and how many were wrapped anew.
    pub counts: RootKeyProgress,
    /// The file that the earlier key was put into; `None` where no file gave way to another.
    pub retired: Option<String>,
}

/// The root keys, as whoever loaded them keeps them.
#[async_trait]
pub trait RootKeys: Send + Sync {
    /// Every key that is loaded or that something is under, the one in force first. Looks at all that is wrapped.
    ///
    /// # Errors
    /// Where the key-value store fails; [`Reason::Unavailable`] where there is so much that a call would take too long:
    /// asked again, the answer may be there.
    async fn status(&self) -> Result<Vec<RootKeyInfo>, BrokerError>;

    /// Wraps everything by the newest key; where that is in a file and everything is under it already, makes a new one
    /// first, unless `rewrap_only`. May be dropped, and the process ended, at any point: asked again, it goes on. The
    /// caller sees to it that there is one at a time.
    ///
    /// # Errors
    /// Where something can't be opened, read or written; what was wrapped anew stays so. [`Reason::Conflict`] where
    /// everything is under the newest key, and another is not the broker's to make: nothing is changed then, and for
    /// `rewrap_only` it is no error.
    async fn rotate(
        &self,
        rewrap_only: bool,
        progress: &watch::Sender<RootKeyProgress>,
    ) -> Result<RootKeyRotated, BrokerError>;
}

/// A key that the audit log was signed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditKeyInfo {
    /// Its id, as checkpoints name it.
    pub id: String,
    /// Its public half, 64 hex digits.
    pub public_key: String,
    /// It signs what is written now.
    pub in_force: bool,
}

/// What a rotation of the audit log's key did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditKeyRotated {
    /// The key in force.
    pub info: AuditKeyInfo,
    /// When the checkpoint was written that the key before vouches for it with.
    pub at: Timestamp,
}

/// The keys of the audit log, as whoever loaded them keeps them.
#[async_trait]
pub trait AuditKeys: Send + Sync {
    /// Makes a new key, has the one in force sign a checkpoint that names it, and puts it in force.
    ///
    /// # Errors
    /// Where the key can't be kept or the log can't be written.
    async fn rotate(&self) -> Result<AuditKeyRotated, BrokerError>;

    /// Every key, the one in force first.
    fn status(&self) -> Vec<AuditKeyInfo>;
}

/// All of the broker's own keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStatus {
    /// The root keys, the one in force first.
    pub root_keys: Vec<RootKeyInfo>,
    /// The keys of the audit log, the one in force first.
    pub audit_keys: Vec<AuditKeyInfo>,
}

/// The hooks into those who keep the keys.
pub struct Keys {
    root: Arc<dyn RootKeys>,
    audit: Arc<dyn AuditKeys>,
    /// Who rotates the root key at the moment.
    rotating: Mutex<Option<String>>,
}

impl Keys {
    /// Keys kept by these.
    #[must_use]
    pub fn new(root: Arc<dyn RootKeys>, audit: Arc<dyn AuditKeys>) -> Self {
        Self { root, audit, rotating: Mutex::new(None) }
    }

    /// The right to rotate the root key, which one call at a time has.
    fn turn(&self, call: &Call) -> Result<Turn<'_>, BrokerError> {
        let mut rotating = self.rotating.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = &*rotating {
            let message = format!(
                "the root key is being rotated already, as {other} asked; `claviger key status` shows how far that is"
            );
            return Err(BrokerError::rejected(Reason::Conflict, message));
        }
        *rotating = Some(format!("{} in request {}", call.principal, call.request_id));
        Ok(Turn(&self.rotating))
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("rotating", &self.rotating).finish_non_exhaustive()
    }
}

struct Turn<'a>(&'a Mutex<Option<String>>);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Broker {
    /// The broker's own keys, and what is under which.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn key_status(&self, call: &Call) -> Result<KeyStatus, BrokerError> {
        let grant = self.authorize(call, "key_status", Action::Administer, &Resource::Broker).await?;
        let audit_keys = self.parts.keys.audit.status();
        let status = self.parts.keys.root.status().await;
        let status = status.map(|root_keys| KeyStatus { root_keys, audit_keys });
        self.finished(call, "key_status", &grant, status).await
    }

    /// Rotates the root key, as [`RootKeys::rotate`] does, until `stop` says true: then what is done stays done, and the
    /// rest is left for the next time. `progress` hears how far it is.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker. [`Reason::Conflict`] where another call is at it.
    pub async fn rotate_root_key(
        &self,
        call: &Call,
        rewrap_only: bool,
        progress: watch::Sender<RootKeyProgress>,
        stop: watch::Receiver<bool>,
    ) -> Result<RootKeyRotated, BrokerError> {
        let grant = self.authorize(call, "rotate_root_key", Action::Administer, &Resource::Broker).await?;
        self.intend(call, "rotate_root_key", &grant).await?;
        let rotated = self.rotated(call, rewrap_only, &progress, stop).await;
        let record = record::of_grant(call, "rotate_root_key", &grant);
        let reached = *progress.borrow();
        let record = if rotated.is_err() { record.with_detail(said_of(&reached)) } else { record };
        self.released(&grant, record, rotated, |rotated, record| {
            record.done().with_detail(format!("root key {}: {}", rotated.id, said_of(&rotated.counts)))
        })
        .await
    }

    async fn rotated(
        &self,
        call: &Call,
        rewrap_only: bool,
        progress: &watch::Sender<RootKeyProgress>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<RootKeyRotated, BrokerError> {
        let _turn = self.parts.keys.turn(call)?;
        tokio::select! {
            rotated = self.parts.keys.root.rotate(rewrap_only, progress) => rotated,
            _ = stop.wait_for(|stop| *stop) => Err(BrokerError::rejected(
                Reason::Unavailable,
                "the broker is shutting down; what is wrapped anew stays so, ask again for the rest",
            )),
        }
    }

    /// Makes a new key for the audit log, vouched for by the one in force.
    ///
    /// # Errors
    /// [`BrokerError`]; needs [`Action::Administer`] on the broker.
    pub async fn rotate_audit_key(&self, call: &Call) -> Result<AuditKeyRotated, BrokerError> {
        let grant = self.authorize(call, "rotate_audit_key", Action::Administer, &Resource::Broker).await?;
        self.intend(call, "rotate_audit_key", &grant).await?;
        let rotated = self.parts.keys.audit.rotate().await;
        let record = record::of_grant(call, "rotate_audit_key", &grant);
        self.released(&grant, record, rotated, |rotated, record| {
            record.done().with_detail(format!("audit key {}", rotated.info.id))
        })
        .await
    }
}

fn said_of(progress: &RootKeyProgress) -> String {
    let RootKeyProgress { done, total, rewrapped } = progress;
    format!("{rewrapped} of {total} keys wrapped anew, {done} looked at")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned as _;
    use crate::identity::Principal;

    /// Nothing of it is asked here.
    struct Unasked;

    #[async_trait]
    impl RootKeys for Unasked {
        async fn status(&self) -> Result<Vec<RootKeyInfo>, BrokerError> {
            Ok(Vec::new())
        }

        async fn rotate(
            &self,
            _: bool,
            _: &watch::Sender<RootKeyProgress>,
        ) -> Result<RootKeyRotated, BrokerError> {
            Err(BrokerError::rejected(Reason::Internal, "not here"))
        }
    }

    #[async_trait]
    impl AuditKeys for Unasked {
        async fn rotate(&self) -> Result<AuditKeyRotated, BrokerError> {
            Err(BrokerError::rejected(Reason::Internal, "not here"))
        }

        fn status(&self) -> Vec<AuditKeyInfo> {
            Vec::new()
        }
    }

    #[test]
    fn one_call_at_a_time_rotates_and_the_next_is_told_whose() {
        let keys = Keys::new(Arc::new(Unasked), Arc::new(Unasked));
        let call = |id: &str| Call::internal(Principal::internal(id, ["administrators"]), "test");
        let first = call("first");
        let turn = keys.turn(&first).unwrap();
        let error = keys.turn(&call("second")).err().unwrap();
        assert_eq!(error.reason(), Reason::Conflict);
        let text = error.to_string();
        assert!(text.contains("first") && text.contains(&*first.request_id), "{text}");
        drop(turn);
        assert!(keys.turn(&call("second")).is_ok());
    }
}
