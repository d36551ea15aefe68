//! Space that is set aside, so that what was begun can be put on record to its end though the disk fills up meanwhile.
//!
//! ```text
//!             0                  acknowledged                                        room
//!   segment   ├──────────────────────┼─────────────────────┬───────────────┬──────────┤
//!               lines                │ owed: reserved and  │ for the log's │ at hand, while there is more
//!                                    │ not written yet     │ own words     │
//!                           the file's end; the blocks behind it are the file's (fallocate, KEEP_SIZE)
//! ```
//!
//! The file is as long as it was, so that whoever reads it sees no difference, and a crash leaves none. Its own blocks
//! are the only space that nobody else on the disk can take; a file beside it that is shrunk when it is needed would give
//! them to whoever is first. Where zeros were written ahead, the blocks are there: a segment is only prepared on a file
//! system that overwrites in place, so that as many bytes as are zeros need no others.
//!
//! INVARIANT: while `owed` is not 0, lines are written only where as many bytes as are owed have their blocks behind them.
//! A record within a reservation brings its own; what it turns out not to need goes to the log's own words. Any other
//! line is refused where no block can be had in place of those that it would take.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use super::AuditError;
use super::chain::FRAME;
use super::encode::Batch;
use super::log::Shared;

/// The fields of a checkpoint in bytes, at most.
const CHECKPOINT: usize = 320;

/// Space in a [`Log`](super::Log) that is set aside for its holder; see [`Log::reserve`](super::Log::reserve). What is left
/// of it goes back when it is dropped.
pub struct Reservation {
    hold: Arc<Hold>,
}

impl Reservation {
    pub(super) const fn new(hold: Arc<Hold>) -> Self {
        Self { hold }
    }

    /// How many bytes are left, without those of records that are on their way.
    #[must_use]
    pub fn rest(&self) -> u64 {
        self.hold.rest.load(Relaxed)
    }

    /// Takes what a record needs; `None` where there is not so much left.
    pub(super) fn claim(&self, log: &Arc<Shared>, record: &Batch) -> Result<Option<Claim>, AuditError> {
        if !Arc::ptr_eq(log, &self.hold.shared) {
            return Err(AuditError::Record("the reservation is one of another log".to_owned()));
        }
        let bytes = room_of(record.bytes());
        let taken = self.hold.rest.fetch_update(Relaxed, Relaxed, |rest| rest.checked_sub(bytes));
        Ok(taken.is_ok().then(|| Claim { hold: Arc::clone(&self.hold), bytes }))
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation").field("rest", &self.rest()).finish_non_exhaustive()
    }
}

/// What a record may take on the disk: its line, and the checkpoint that may follow it.
///
/// Never is there more than one checkpoint for each record of a batch: each follows a record that none followed before,
/// and only the first can owe that to a record of an earlier batch.
fn room_of(fields: usize) -> u64 {
    u64::try_from(FRAME + fields + FRAME + CHECKPOINT).unwrap_or(u64::MAX)
}

/// A reservation's bytes, shared by its holder and by the records on their way.
pub(super) struct Hold {
    shared: Arc<Shared>,
    wanted: u64,
    /// What is neither claimed nor written; 0 until it is granted.
    rest: AtomicU64,
}

impl Hold {
    pub(super) fn new(shared: Arc<Shared>, wanted: u64) -> Self {
        Self { shared, wanted, rest: AtomicU64::new(0) }
    }

    pub(super) const fn wanted(&self) -> u64 {
        self.wanted
    }

    /// Says that the blocks are there. By the writer, once.
    pub(super) fn grant(&self) {
        self.shared.queue.owed.fetch_add(self.wanted, Relaxed);
        self.rest.store(self.wanted, Relaxed);
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = self.rest.load(Relaxed);
        f.debug_struct("Hold").field("wanted", &self.wanted).field("rest", &rest).finish_non_exhaustive()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let rest = mem::take(self.rest.get_mut());
        if rest > 0 {
            self.shared.queue.owed.fetch_sub(rest, Relaxed);
            self.shared.queue.poke();
        }
    }
}

/// The part of a reservation that one record takes. Goes back to it when it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    hold: Arc<Hold>,
    bytes: u64,
}

impl Claim {
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The record is written: nothing is owed for it any more.
    pub(super) fn spend(mut self) {
        self.hold.shared.queue.owed.fetch_sub(mem::take(&mut self.bytes), Relaxed);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.hold.rest.fetch_add(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::chain::{ChainHash, Fields, Head, Lines, Notice, encode};
    use crate::audit::checkpoint::{Checkpoint, SigningKey, Statement};
    use crate::audit::{RECORD_ROOM, Record, Settings};
    use crate::clock::SystemClock;
    use std::path::Path;

    fn key() -> SigningKey {
        SigningKey::from_pkcs8(&SigningKey::generate_pkcs8().unwrap()).unwrap()
    }

    fn shared() -> Arc<Shared> {
        let settings = Settings::new("audit", "a");
        Arc::new(Shared::new(Path::new("audit/a"), &settings, key().verifying_key(), SystemClock::shared()))
    }

    fn reservation(shared: &Arc<Shared>, bytes: u64) -> Reservation {
        let hold = Arc::new(Hold::new(Arc::clone(shared), bytes));
        hold.grant();
        Reservation::new(hold)
    }

    fn owed(shared: &Shared) -> u64 {
        shared.queue.owed.load(Relaxed)
    }

    fn fields(detail: &str) -> Batch {
        encode(&Record { detail: detail.to_owned(), ..Record::default() }).unwrap()
    }

    #[test]
    fn what_is_claimed_is_spent_or_comes_back() {
        let shared = shared();
        let fields = fields("a");
        let one = room_of(fields.bytes());
        let reservation = reservation(&shared, 2 * one + 1);
        let spent = reservation.claim(&shared, &fields).unwrap().unwrap();
        let dropped = reservation.claim(&shared, &fields).unwrap().unwrap();
        assert_eq!((spent.bytes(), reservation.rest()), (one, 1));
        assert!(reservation.claim(&shared, &fields).unwrap().is_none(), "there is not so much left");
        assert_eq!((reservation.rest(), owed(&shared)), (1, 2 * one + 1));
        spent.spend();
        assert_eq!((reservation.rest(), owed(&shared)), (1, one + 1));
        drop(dropped);
        assert_eq!((reservation.rest(), owed(&shared)), (one + 1, one + 1));
        assert_eq!(format!("{reservation:?}"), format!("Reservation {{ rest: {}, .. }}", one + 1));
        let late = reservation.claim(&shared, &fields).unwrap().unwrap();
        drop(reservation);
        assert_eq!(owed(&shared), one + 1, "a record on its way keeps what is its own");
        drop(late);
        assert_eq!(owed(&shared), 0);
    }

    #[test]
    fn what_was_not_granted_is_not_owed() {
        let shared = shared();
        drop(Reservation::new(Arc::new(Hold::new(Arc::clone(&shared), 100))));
        assert_eq!(owed(&shared), 0);
    }

    #[test]
    fn a_reservation_is_for_its_own_log() {
        let (shared, other) = (shared(), self::shared());
        let error = reservation(&shared, 10_000).claim(&other, &fields("")).unwrap_err();
        assert!(matches!(error, AuditError::Record(_)), "{error}");
    }

    /// The longest frame there is: of the longest name, the last sequence and the longest time.
    fn longest(fields: &[u8]) -> usize {
        let instance = "i".repeat(64);
        let mut lines = Lines::new(&instance);
        let head = Head { seq: u64::MAX - 1, hash: ChainHash::genesis(&instance) };
        let time = format!("{:.6}", jiff::Timestamp::MIN);
        lines.push(head, &time, fields);
        lines.bytes().len()
    }

    #[test]
    fn a_claim_covers_the_line_and_a_checkpoint() {
        let head = Head { seq: u64::MAX, hash: ChainHash::genesis("a") };
        let statement = Statement { instance: "a", head, generation: u64::MAX, time: "" };
        let notice = Notice::Checkpoint(Checkpoint::new(&statement, &key(), None));
        let checkpoint = Fields::of_notice(&notice).unwrap();
        let checkpoint = checkpoint.as_bytes();
        assert!(checkpoint.len() <= CHECKPOINT, "{}", checkpoint.len());
        for text in ["", "a", &"\u{1}".repeat(1_024)] {
            let fields = fields(text);
            let written = longest(fields.iter().next().unwrap()) + longest(checkpoint);
            let (written, room) = (u64::try_from(written).unwrap(), room_of(fields.bytes()));
            assert!(written <= room, "{written} > {room}");
        }
    }

    #[test]
    fn a_usual_record_has_its_room() {
        let record = Record {
            kind: Some(crate::audit::Kind::Intent),
            principal: "Workload::\"claviger/rotation\"".to_owned(),
            environment: "e".repeat(63),
            secret: "s".repeat(512),
            version_id: "v".repeat(64),
            labels: vec!["AWSCURRENT".to_owned(), "AWSPENDING".to_owned()],
            policies: vec!["a-policy-with-a-long-name".to_owned(); 8],
            request_id: "r".repeat(64),
            reason: "w".repeat(512),
            detail: "d".repeat(512),
            ..Record::default()
        };
        assert!(room_of(encode(&record).unwrap().bytes()) <= RECORD_ROOM);
    }
}
