//! One program's standing with one broker: the connection, the token that it is known by, and how a call is carried out.
//!
//! INVARIANT: a token is replaced only by one from the same file, and only where the broker refused the one before; no
//! call is ever made without a token because one could not be read.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tonic::{Response, Status};

use super::address::Address;
use super::connection::{Connection, Secrets};
use super::error::ClientError;
use super::files::read_token_file;
use super::retry::{Again, persist};
use super::tls::TlsOptions;
use crate::clock::SharedClock;
use crate::error::Reason;
use crate::secret::SecretValue;

/// How a program is known to the broker.
#[derive(Debug, Clone)]
pub(super) enum Credential {
    /// By its Unix user or its client certificate.
    Itself,
    /// By this token.
    Token(SecretValue),
    /// By the token in this file, read again when the broker no longer takes it.
    File(PathBuf),
}

#[derive(Debug)]
pub(super) struct Session {
    attached: ArcSwap<Attached>,
    token_file: Option<PathBuf>,
    pub(super) timeout: Duration,
    pub(super) clock: SharedClock,
}

/// The connection as it is used now.
#[derive(Debug)]
struct Attached {
    connection: Connection,
    token: Option<SecretValue>,
}

impl Session {
    /// Connects, and tries again while nobody answers and there is time.
    pub(super) async fn open(
        address: &Address,
        tls: &TlsOptions,
        credential: Credential,
        timeout: Duration,
        clock: SharedClock,
    ) -> Result<Self, ClientError> {
        let (token, token_file) = match credential {
            Credential::Itself => (None, None),
            Credential::Token(token) => (Some(token), None),
            Credential::File(path) => (Some(read_again(path.clone()).await?), Some(path)),
        };
        let connect = |left| Connection::open_with(address, tls, token.as_ref(), left);
        let connection = persist(timeout, &*clock, Again::Harmless, connect).await?;
        let attached = ArcSwap::from_pointee(Attached { connection, token });
        Ok(Self { attached, token_file, timeout, clock })
    }

    /// Asks, again where that can help, until there is an answer or no time left.
    pub(super) async fn ask<A, F>(&self, again: Again, send: impl Fn(Secrets) -> F) -> Result<A, ClientError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let attempt = |left| self.attempt(Some(left), &send);
        persist(self.timeout, &*self.clock, again, attempt).await
    }

    /// Asks once for what has no end; only its beginning has a deadline.
    pub(super) async fn follow<A, F>(&self, send: impl Fn(Secrets) -> F) -> Result<A, ClientError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let begun = tokio::time::timeout(self.timeout, self.attempt(None, &send)).await;
        begun.unwrap_or_else(|_| {
            Err(ClientError::unavailable(format!(
                "the broker did not begin to answer within {:?}",
                self.timeout
            )))
        })
    }

    async fn attempt<A, F>(
        &self,
        deadline: Option<Duration>,
        send: &impl Fn(Secrets) -> F,
    ) -> Result<A, ClientError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let attached = self.attached.load_full();
        let refused = match send(attached.connection.with_deadline(deadline).secrets()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => ClientError::from(status),
        };
        if refused.reason != Reason::Unauthenticated || !self.renew(&attached).await {
            return Err(refused);
        }
        let attached = self.attached.load_full();
        let answer = send(attached.connection.with_deadline(deadline).secrets()).await;
        Ok(answer.map_err(ClientError::from)?.into_inner())
    }

    /// Whether there is another token now than the one that was refused: orchestrators put a new one into the file
    /// while the program runs.
    async fn renew(&self, refused: &Arc<Attached>) -> bool {
        let Some(path) = &self.token_file else { return false };
        if !Arc::ptr_eq(&self.attached.load_full(), refused) {
            return true;
        }
        let renewed = read_again(path.clone()).await.and_then(|token| {
            let known = refused.token.as_ref().is_some_and(|refused| refused.same_as(&token));
            let connection = refused.connection.with_token(&token)?;
            Ok((!known).then_some(Attached { connection, token: Some(token) }))
        });
        match renewed {
            Ok(Some(attached)) => self.attached.store(Arc::new(attached)),
            Ok(None) => return false,
            Err(error) => {
                tracing::warn!("the broker refused the token, and there is no other: {error}");
                return false;
            }
        }
        true
    }
}

async fn read_again(path: PathBuf) -> Result<SecretValue, ClientError> {
    let read = tokio::task::spawn_blocking(move || read_token_file(&path)).await;
    read.unwrap_or_else(|_| Err(ClientError::unavailable("the token was not read: the process is ending")))
}
