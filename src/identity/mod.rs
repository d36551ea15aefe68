//! Who is calling. An [`Authenticator`] turns what a connection presents into a [`Principal`]; several stand in a
//! [`Chain`].
//!
//! INVARIANT: a credential that is presented and invalid ends in an error. It never falls back to a weaker one.

pub mod mtls;
pub mod peer_credentials;
pub mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use ring::digest;

use crate::error::{Reason, Reasoned};
use crate::secret::{EnvironmentName, SecretValue};

/// A person or a program; Cedar's entity types of the same names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrincipalKind {
    /// A person.
    User,
    /// A program: a service, a CI job, the rotation engine.
    Workload,
}

impl PrincipalKind {
    /// The Cedar entity type.
    #[must_use]
    pub const fn entity_type(self) -> &'static str {
        match self {
            Self::User => "User",
            Self::Workload => "Workload",
        }
    }
}

/// Whether text may name a principal or a group: 1 to 128 printable ASCII characters without spaces. What differs in
/// nothing but what can't be seen would be two principals to the policies and one to a reader.
#[must_use]
pub fn is_word(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic())
}

/// How a principal proved who it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Proof {
    /// `peer_credentials`, `token`, `mtls`, `internal`; later `jwt`, `sigv4`.
    pub method: &'static str,
    /// What of it may be written down: `uid=1000`, a token's public id; never the credential.
    pub detail: String,
}

/// Where a call came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum SourceAddress {
    /// A Unix socket; the kernel vouches for the peer.
    Unix {
        /// The peer's process id, where the kernel says it.
        pid: Option<i32>,
    },
    /// A TCP connection.
    Tcp(std::net::SocketAddr),
    /// The broker itself.
    #[default]
    Internal,
}

impl SourceAddress {
    /// The address, where the call came over a network.
    #[must_use]
    pub const fn ip(&self) -> Option<std::net::IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip().to_canonical()),
            Self::Unix { .. } | Self::Internal => None,
        }
    }
}

impl fmt::Display for SourceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { pid: Some(pid) } => write!(f, "unix:pid={pid}"),
            Self::Unix { pid: None } => f.write_str("unix"),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Internal => f.write_str("internal"),
        }
    }
}

/// Who is calling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    kind: PrincipalKind,
    id: String,
    groups: BTreeSet<String>,
    claims: BTreeMap<String, String>,
    proof: Proof,
    fingerprint: Fingerprint,
    environments: Option<Arc<BTreeSet<EnvironmentName>>>,
    /// As records say it: made once, and written with every request.
    shown: String,
    shown_proof: String,
}

/// A digest of all that decisions may depend on: kind, id, groups, claims and the method of proof.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 16]);

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl Principal {
    /// A principal. Only authenticators and the broker's own start-up make one.
    #[must_use]
    pub fn new(
        kind: PrincipalKind,
        id: impl Into<String>,
        groups: BTreeSet<String>,
        claims: BTreeMap<String, String>,
        proof: Proof,
    ) -> Self {
        let id = id.into();
        let mut context = digest::Context::new(&digest::SHA256);
        // Length-prefixed, so that no two principals write the same bytes.
        let mut part = |text: &str| {
            context.update(&u64::try_from(text.len()).unwrap_or(u64::MAX).to_be_bytes());
            context.update(text.as_bytes());
        };
        part(kind.entity_type());
        part(&id);
        part(proof.method);
        part(&groups.len().to_string());
        groups.iter().for_each(|group| part(group));
        for (name, value) in &claims {
            part(name);
            part(value);
        }
        let mut fingerprint = [0; 16];
        for (to, from) in fingerprint.iter_mut().zip(context.finish().as_ref()) {
            *to = *from;
        }
        let shown = format!("{}::\"{}\"", kind.entity_type(), id.escape_default());
        let shown_proof = match proof.detail.as_str() {
            "" => proof.method.to_owned(),
            detail => format!("{}:{detail}", proof.method),
        };
        let fingerprint = Fingerprint(fingerprint);
        Self { kind, id, groups, claims, proof, fingerprint, environments: None, shown, shown_proof }
    }

    /// The broker itself, doing its own work (seeding samples, rotation). Authorised like anyone else.
    #[must_use]
    pub fn internal(id: &str, groups: impl IntoIterator<Item = &'static str>) -> Self {
        let groups = groups.into_iter().map(str::to_owned).collect();
        let proof = Proof { method: "internal", detail: String::new() };
        Self::new(PrincipalKind::Workload, id, groups, BTreeMap::new(), proof)
    }

    /// The same, good for these environments alone, and not for the broker's own business. What policy permits is a
    /// question of its own: this only takes away.
    #[must_use]
    pub fn only_in(self, environments: BTreeSet<EnvironmentName>) -> Self {
        Self { environments: Some(Arc::new(environments)), ..self }
    }

    /// Whether its credential is good for an environment; `None` is the broker itself.
    #[must_use]
    pub fn reaches(&self, environment: Option<&EnvironmentName>) -> bool {
        let Some(environments) = &self.environments else { return true };
        environment.is_some_and(|environment| environments.contains(environment))
    }

    /// A person or a program.
    #[must_use]
    pub const fn kind(&self) -> PrincipalKind {
        self.kind
    }

    /// The id within its kind. Compared exactly: case and spaces count.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The groups that it belongs to.
    #[must_use]
    pub const fn groups(&self) -> &BTreeSet<String> {
        &self.groups
    }

    /// What else its proof says of it.
    #[must_use]
    pub const fn claims(&self) -> &BTreeMap<String, String> {
        &self.claims
    }

    /// How it proved itself.
    #[must_use]
    pub const fn proof(&self) -> &Proof {
        &self.proof
    }

    /// It, as messages and records show it: `User::"ana"`.
    #[must_use]
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// Its proof, as records show it: `token:AbC123`.
    #[must_use]
    pub fn shown_proof(&self) -> &str {
        &self.shown_proof
    }

    /// What a cached decision is keyed by.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// What a connection or a request presents, read at the edge.
#[derive(Debug, Clone, Default)]
pub struct Presented {
    /// The peer's uid, gid and pid, where the kernel vouches for them.
    pub peer: Option<Peer>,
    /// The bearer credential of the `authorization` header, without the scheme.
    pub bearer: Option<SecretValue>,
    /// The client certificate that the TLS handshake verified.
    pub certificate: Option<Arc<mtls::ClientCertificate>>,
    /// Where the call came from.
    pub source: SourceAddress,
}

/// A Unix-socket peer, from `SO_PEERCRED`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id, where the kernel says it.
    pub pid: Option<i32>,
}

/// Why a caller is not known. The message never holds the credential, nor says which part of it was wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Nothing was presented that this listener accepts.
    #[error("no credential was presented; set CLAVIGER_TOKEN or --token-file, or call over the Unix socket")]
    Missing,
    /// A credential was presented and is not valid.
    #[error("the {method} presented is not valid: {problem}")]
    Invalid {
        /// Which kind of credential.
        method: &'static str,
        /// `unknown`, `expired`, `revoked`, `malformed`; and the mend.
        problem: &'static str,
    },
    /// The state needed to check it can't be read.
    #[error("the {method} presented can't be checked now: {cause}")]
    Unavailable {
        /// Which kind of credential.
        method: &'static str,
        /// What failed.
        cause: String,
    },
}

impl Reasoned for IdentityError {
    fn reason(&self) -> Reason {
        match self {
            Self::Missing | Self::Invalid { .. } => Reason::Unauthenticated,
            Self::Unavailable { .. } => Reason::Unavailable,
        }
    }
}

/// Recognises one kind of credential.
#[async_trait]
pub trait Authenticator: Send + Sync {
    /// `Ok(None)` where nothing of this kind is presented.
    ///
    /// # Errors
    /// [`IdentityError::Invalid`] where something of this kind is presented and is not valid.
    async fn authenticate(&self, presented: &Presented) -> Result<Option<Arc<Principal>>, IdentityError>;

    /// Whether something of this kind is presented at all. Cheap: asked with every call.
    fn concerns(&self, presented: &Presented) -> bool;
}

/// Authenticators in the order in which they speak for a caller who presents several kinds: a token, which a program
/// presents by name, before the certificate or the Unix user of whatever carries its calls.
///
/// INVARIANT: each judges what is presented of its kind, and one that finds it invalid refuses the call, whatever the
/// others find.
pub struct Chain {
    authenticators: Vec<Arc<dyn Authenticator>>,
}

impl Chain {
    /// A chain, in the order in which they speak.
    #[must_use]
    pub const fn new(authenticators: Vec<Arc<dyn Authenticator>>) -> Self {
        Self { authenticators }
    }

    /// Who is calling.
    ///
    /// # Errors
    /// [`IdentityError::Missing`] where nothing is recognised; otherwise the error of the first that refuses.
    pub async fn authenticate(&self, presented: &Presented) -> Result<Arc<Principal>, IdentityError> {
        let mut known = None;
        for authenticator in self.authenticators.iter().filter(|one| one.concerns(presented)) {
            let found = authenticator.authenticate(presented).await?;
            known = known.or(found);
        }
        known.ok_or(IdentityError::Missing)
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("authenticators", &self.authenticators.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says the same whatever is presented.
    struct Says(Result<&'static str, &'static str>);

    #[async_trait]
    impl Authenticator for Says {
        async fn authenticate(&self, _: &Presented) -> Result<Option<Arc<Principal>>, IdentityError> {
            match self.0 {
                Ok(id) => Ok(Some(Arc::new(Principal::internal(id, [])))),
                Err(problem) => Err(IdentityError::Invalid { method: "test", problem }),
            }
        }

        fn concerns(&self, _: &Presented) -> bool {
            true
        }
    }

    async fn known(says: &[Result<&'static str, &'static str>]) -> Result<String, IdentityError> {
        let chain = says.iter().map(|said| Arc::new(Says(*said)) as Arc<dyn Authenticator>).collect();
        let known = Chain::new(chain).authenticate(&Presented::default()).await;
        known.map(|principal| principal.id().to_owned())
    }

    #[tokio::test]
    async fn the_first_speaks_and_whatever_is_invalid_refuses() {
        assert_eq!(known(&[Ok("token"), Ok("certificate")]).await.unwrap(), "token");
        let invalid = |said| matches!(said, Err(IdentityError::Invalid { .. }));
        assert!(invalid(known(&[Ok("token"), Err("of another trust domain")]).await));
        assert!(invalid(known(&[Err("revoked"), Ok("certificate")]).await));
        assert_eq!(known(&[]).await.unwrap_err(), IdentityError::Missing);
    }
}
