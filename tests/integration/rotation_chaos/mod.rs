//! Rotation of a real PostgreSQL by the real binary, while everything around it breaks, under the eyes of an oracle.
//!
//! ```text
//!            tests/python/oracle.py ── every 50 ms: AWSCURRENT, a fresh login, what only the owner may do
//!               │ gRPC        │ libpq
//!               ▼             ▼
//!   test ──▶ broker ──┬──▶ PostgreSQL          signals: KILL, STOP, CONT; clock: libfaketime; disk: tmpfs
//!                     ├──▶ proxy ──▶ PostgreSQL   loses requests, loses answers, brings them late
//!                     └──▶ FaultProxy ──▶ moto    where the values are in AWS
//! ```
//!
//! What has to hold afterwards is the same for all of them, [`Stage::assert_sound`] and [`Account::assert_clean`]: the
//! rotation is idle without anyone's help, both of the database's users have passwords that the store knows, AWSPENDING
//! is on nothing, and the oracle has seen no login fail.

mod clocks;
mod database;
mod faults;
mod kills;
mod oracle;
mod people;
mod proxy;
mod seed;
mod stage;
mod steady;
mod targets;

use std::time::Duration;

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(120);
/// How often it is asked again whether something has come about.
const PAUSE: Duration = Duration::from_millis(20);

/// Asks until there is an answer.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(HUNG, asking).await.unwrap_or_else(|_| panic!("hung: {what}"))
}
