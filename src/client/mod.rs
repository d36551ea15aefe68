//! What asks a broker.
//!
//! A Rust service uses a [`Client`]: typed calls with a deadline and a retry policy, and values kept at hand by a watch.
//!
//! ```no_run
//! use claviger::client::Client;
//!
//! # async fn example() -> Result<(), claviger::client::ClientError> {
//! let client = Client::builder()
//!     .environment("production")
//!     .consumer("orders")
//!     .token_file("/run/secrets/claviger-token")
//!     .build()
//!     .await?;
//!
//! // Asked each time, answered from the broker's cache.
//! let signing_key = client.get("jwt#secret").await?;
//!
//! // At hand, without a question; told when it is rotated; there while the broker is away.
//! let mut database = client.cached("database").await?;
//! let now = database.current()?;
//! if now.stale {
//!     eprintln!("the broker is away; the password is {:?} old", now.age);
//! }
//! let rotated = database.changed().await?;
//! database.report_in_use(&rotated).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Whoever wants the messages themselves (the command line does) uses a [`Connection`]:
//!
//! ```text
//! Address ─▶ Connection ─▶ secrets() policies() audit() tokens() keys() caches() rotations() ─▶ generated calls
//!               │              each call carries the token and a deadline
//!               ├─ Unix socket: the kernel says who serves it, before the first byte is sent
//!               ├─ https://: TLS 1.3, the certificates read anew for each connection
//!               └─ http://, https://: what the broker says as it ends a connection is heard out (network.rs)
//!
//! Client ─▶ Session ─▶ Connection          tries again, reads the token file again
//!   └─ Cached ─▶ Keeper ─▶ WatchSecrets     one watch for all names
//! ```
//!
//! INVARIANT: neither a token nor a value goes where others could read it: plain HTTP only on loopback, a Unix socket
//! only where someone serves it who may (see [`Connection::open`]).
//!
//! What wiping does not reach: the header that carries the token, the key of a client certificate while the TLS library
//! has it, and the buffers of the HTTP/2 and TLS libraries.

mod address;
mod answers;
mod builder;
mod cached;
mod calls;
mod connection;
mod error;
mod files;
mod keeper;
mod network;
mod retry;
mod session;
mod tls;
mod wire;

pub use address::{Address, SOCKET_NAME, SYSTEM_SOCKET};
pub use answers::{
    Answer, Consumer, Description, Expected, Listed, PutOptions, Query, RolledBack, ToReference, Written,
};
pub use builder::Builder;
pub use cached::{Cached, Snapshot};
pub use calls::Client;
pub use connection::{
    Audit, Caches, Connection, Keys, LONGEST_DEADLINE, Line, Policies, Presenting, Rotations, Secrets, Tokens,
};
pub use error::ClientError;
pub use files::read_token_file;
pub use tls::{ClientIdentity, TlsOptions};
pub use wire::{payload, received};
