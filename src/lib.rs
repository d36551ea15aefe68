//! Claviger, the keeper of the keys: a secrets broker and rotation service.
//!
//! It stands between the places where secrets live and the processes that need them. Two paths explain the program:
//!
//! ```text
//! read      request ─▶ identity ─▶ policy ─▶ cache ─▶ store ─▶ audit ─▶ reply
//!           server     identity    policy    cache    store    audit    server
//!                         └──────────── broker: read this first ────────────┘
//!
//! rotation  schedule ─▶ lease ─▶ the rotator's four steps ─▶ labels moved by compare-and-swap ─▶ watchers ─▶ audit
//!           rotation     ledger    rotators, target           broker: one more principal that calls it
//! ```
//!
//! A module may use only modules above it in this list; `tests/layering.rs` fails on an arrow against the order.

pub mod error; //       stable reasons; each layer has its own error type that names one
pub mod telemetry; //   logs, metrics, traces, and what is never in them
pub mod secret; //      names, references, values, versions, labels and their rules: no I/O, no async
pub mod clock; //       the only reader of time
pub mod crypto; //      envelope encryption, root keys, key files, memory
pub mod kv; //          one small transactional key-value trait with revisions; SQLite
pub mod environment; // the registry: store, TTLs, protection, parent
pub mod identity; //    who is calling: Principal, the Authenticator trait; peer credentials, tokens, mutual TLS
pub mod policy; //      may they: Cedar; authorize gives a Grant that only this module can make
pub mod audit; //       what happened: chained log, checkpoints, verify, query
pub mod store; //       where versions live: Store; sealed (over kv), aws; Guarded takes grants
pub mod cache; //       a Store around a Store
pub mod broker; //      read this first: grant, cached store, audit, value; watches; every front door calls it
pub mod rotation; //    schedule, engine (the state machine), rotators: one file each
pub mod proto; //       generated from proto/claviger/v1, checked in
pub mod client; //      what a Rust program uses: typed calls, a local cache, a watch
pub mod inject; //      manifest, variables, the child's environment, exec
pub mod server; //      gRPC: services, convert, status; TLS, limits, drain; health and metrics over HTTP
pub mod config; //      raw to resolved, and the assembly of a running broker
pub mod cli; //         one file per subcommand, thin
