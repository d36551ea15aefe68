//! Every record, looked at now and then: what the index of due times can't show, because it is wrong itself.

use std::time::Duration;

use jiff::Timestamp;

use super::super::Failure;
use super::super::engine::Engine;
use super::super::record::{Health, Rotation, Run};
use super::super::schedule::Verdict;
use super::super::schedule::later;
use super::{Works, is_retiring, put_off, verdict};
use crate::secret::{EnvironmentName, SecretId, SecretName};

/// How many records are read at a time.
const PAGE: usize = 256;
/// What a time may lie further ahead than it should before it is taken for one of another clock.
const SLACK: Duration = Duration::from_secs(60);

/// Mends the index, mends times that a clock set back has moved out of reach, and counts what is in trouble.
pub(super) async fn survey(works: Works) {
    match works.engine.ledger().mend_index().await {
        Ok(0) => {}
        Ok(mended) => tracing::warn!(mended, "the order in which rotations are due was mended"),
        Err(failure) => tracing::warn!(%failure, "the order in which rotations are due can't be checked"),
    }
    let environments: Vec<_> = works.broker.registry().iter().map(|declared| declared.name.clone()).collect();
    let mut seen = Seen::default();
    for environment in environments {
        if let Err(failure) = look_through(&works, &environment, &mut seen).await {
            tracing::warn!(%failure, %environment, "rotations can't be looked through");
        }
    }
    works.figures.note_all(seen.set, seen.paused);
    if seen.moved {
        works.waker.wake();
    }
}

/// What was seen on the way.
#[derive(Default)]
struct Seen {
    set: u64,
    paused: u64,
    /// Whether a time was mended.
    moved: bool,
}

async fn look_through(works: &Works, environment: &EnvironmentName, seen: &mut Seen) -> Result<(), Failure> {
    let mut after: Option<SecretName> = None;
    loop {
        let page = works.engine.ledger().list(environment, after.as_ref(), PAGE).await?;
        after = page.rotations.last().map(|(id, _)| id.name.clone());
        for (id, rotation) in page.rotations {
            seen.set += 1;
            match rotation {
                Ok(rotation) => {
                    seen.paused += u64::from(rotation.health() == Health::Paused);
                    seen.moved |= look_at(works, &id, &rotation).await?;
                }
                Err(failure) => {
                    tracing::error!(secret = %id, %failure, "a rotation can't be looked at");
                    works.figures.note(&id, Some(Health::Blocked));
                }
            }
        }
        if !page.more || after.is_none() {
            return Ok(());
        }
    }
}

/// Whether a time was mended.
async fn look_at(works: &Works, id: &SecretId, rotation: &Rotation) -> Result<bool, Failure> {
    works.figures.note(id, Some(rotation.health()));
    let (engine, now) = (&works.engine, works.engine.clock().now());
    if let Some(run) = &rotation.run {
        let latest = latest(engine, rotation, run, now);
        if run.not_before <= later(latest, SLACK) {
            return Ok(false);
        }
        hasten(engine, id, run.not_before, latest).await?;
        return Ok(true);
    }
    match verdict(engine, id, rotation, now) {
        Verdict::Rebase(next_at) => {
            put_off(engine, id, rotation.next_at, next_at).await?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// The latest time that a run that rests now can have been told to wait for.
fn latest(engine: &Engine, rotation: &Rotation, run: &Run, now: Timestamp) -> Timestamp {
    let settings = engine.settings();
    let retry = settings.retry_to.max(settings.lease);
    match run.definition.retire_after {
        Some(after) if is_retiring(rotation) => later(now, after.max(retry)),
        _ => later(now, retry),
    }
}

async fn hasten(engine: &Engine, id: &SecretId, from: Timestamp, to: Timestamp) -> Result<(), Failure> {
    let change = |rotation: Option<Rotation>| {
        let mended = rotation.map(|mut rotation| {
            if let Some(run) = rotation.run.as_mut().filter(|run| run.not_before == from) {
                run.not_before = to;
            }
            rotation
        });
        Ok((mended, ()))
    };
    engine.ledger().update(id, change).await
}
