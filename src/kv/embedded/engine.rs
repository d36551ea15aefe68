//! Transactions, leases and history on the one connection.
//!
//! INVARIANT: a transaction leaves all of itself or nothing, whatever becomes of the caller. A commit runs in a task
//! of its own, so that a caller who goes away does not take it down halfway. Where even that task is taken down, with
//! its runtime, or a statement fails, the transaction stays marked as open, and whoever holds the connection next
//! rolls back and reads the counters again before anything else.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use sqlx::sqlite::SqliteConnection;
use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard, watch};

use super::file;
use super::watch::{Keys, Position};
use crate::clock::SharedClock;
use crate::kv::{Compare, Event, KvError, LeaseId, Outcome, Revision, Transaction, Write};

pub(super) struct Inner {
    pub(super) path: PathBuf,
    pub(super) clock: SharedClock,
    /// How many revisions back the history goes.
    pub(super) history: i64,
    /// The last committed revision, for who can't wait for `file`.
    pub(super) revision: AtomicU64,
    /// No lease ends before this (Unix time in milliseconds). May be too early, never too late.
    pub(super) next_expiry: AtomicI64,
    /// `None` once closed.
    pub(super) file: Mutex<Option<Owned>>,
}

/// What one operation at a time works with. The order of the fields is that of their ends: the lock goes last.
pub(super) struct Owned {
    pub(super) sqlite: SqliteConnection,
    /// Whether a transaction was begun whose end nobody saw.
    pub(super) in_transaction: bool,
    /// The last revision whose history is gone.
    pub(super) compacted: Revision,
    /// Wakes the watchers. Goes with the connection, which ends them.
    pub(super) latest: watch::Sender<Revision>,
    pub(super) lock: File,
}

/// The last revision, and the last one whose history is gone.
pub(super) type Counters = (Revision, Revision);

pub(super) async fn counters(sqlite: &mut SqliteConnection) -> sqlx::Result<Counters> {
    let found: (i64, i64) = sqlx::query_as("SELECT revision, compacted FROM meta").fetch_one(sqlite).await?;
    Ok(unsigned(found))
}

/// Revisions are stored as SQLite's signed integers; nine quintillion of them will do.
fn unsigned((revision, compacted): (i64, i64)) -> Counters {
    (revision.cast_unsigned(), compacted.cast_unsigned())
}

impl Inner {
    /// The connection, as soon as nobody else has it, and with no transaction on it.
    pub(super) async fn hold(&self) -> Result<MappedMutexGuard<'_, Owned>, KvError> {
        let mut file = MutexGuard::try_map(self.file.lock().await, Option::as_mut).map_err(|_| closed())?;
        if file.in_transaction {
            // Fails where SQLite has rolled back by itself, as after a full disk, which is as good.
            let _ = file.run("ROLLBACK").await;
            // The lost transaction may have been committed after all.
            let found = counters(&mut file.sqlite).await.map_err(self.failed("recovering"))?;
            self.announce(&mut file, found);
            file.in_transaction = false;
        }
        Ok(file)
    }

    /// Compares, and where all of it holds, writes.
    pub(super) async fn apply(&self, file: &mut Owned, transaction: Transaction) -> Result<Outcome, KvError> {
        let unchanged = |succeeded| Outcome { succeeded, revision: self.revision.load(Ordering::Acquire) };
        // Reads before the transaction count as part of it: who holds the connection is the only writer.
        for comparison in &transaction.compare {
            if !file.holds(comparison).await.map_err(self.failed("comparing"))? {
                return Ok(unchanged(false));
            }
        }
        let writes = by_key(transaction.write);
        let leases: Vec<LeaseId> = writes.values().flatten().filter_map(|value| value.lease).collect();
        for lease in leases {
            if !file.has_lease(lease).await.map_err(self.failed("looking up a lease"))? {
                return Err(KvError::LeaseNotFound { id: lease });
            }
        }
        if writes.is_empty() {
            return Ok(unchanged(true));
        }
        match self.write_all(file, writes).await.map_err(self.failed("committing"))? {
            Some(revision) => Ok(Outcome { succeeded: true, revision }),
            None => Ok(unchanged(true)),
        }
    }

    /// Writes all of `writes` with one new revision, and says which; none where nothing was there to delete.
    async fn write_all(&self, file: &mut Owned, writes: Writes) -> sqlx::Result<Option<Revision>> {
        file.begin().await?;
        let counters = self.advance(file).await?;
        let mut changed = false;
        for (key, value) in writes {
            changed |= file.write(counters.0, key, value).await?;
        }
        if !changed {
            file.end("ROLLBACK").await?;
            return Ok(None);
        }
        file.end("COMMIT").await?;
        self.announce(file, counters);
        Ok(Some(counters.0))
    }

    /// Counts a new revision, within a transaction, and forgets the history that has become too old.
    async fn advance(&self, file: &mut Owned) -> sqlx::Result<Counters> {
        let found: (i64, i64) = sqlx::query_as(
            "UPDATE meta SET revision = revision + 1, compacted = max(compacted, revision + 1 - $1)
             RETURNING revision, compacted",
        )
        .bind(self.history)
        .fetch_one(&mut file.sqlite)
        .await?;
        Ok(unsigned(found))
    }

    /// Makes a committed revision known. The caller holds the connection, so that readers and watchers see the
    /// revision and what it changed together.
    fn announce(&self, file: &mut Owned, (revision, compacted): Counters) {
        self.revision.store(revision, Ordering::Release);
        file.compacted = compacted;
        file.latest.send_replace(revision);
    }

    /// Whether a lease may have ended since someone looked.
    pub(super) fn is_due(&self) -> bool {
        self.now() >= self.next_expiry.load(Ordering::Acquire)
    }

    /// Unix time in milliseconds.
    pub(super) fn now(&self) -> i64 {
        self.clock.now().as_millisecond()
    }

    /// Removes the leases whose time is over, with their keys, which get one revision.
    pub(super) async fn end_leases(&self, file: &mut Owned) -> Result<(), KvError> {
        if !self.is_due() {
            return Ok(());
        }
        let next = self.end_leases_until(file, self.now()).await.map_err(self.failed("ending leases"))?;
        self.next_expiry.store(next, Ordering::Release);
        Ok(())
    }

    /// Ends them up to and including `now`; when the next one ends.
    async fn end_leases_until(&self, file: &mut Owned, now: i64) -> sqlx::Result<i64> {
        file.begin().await?;
        let holds_keys: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM kv WHERE lease IN (SELECT id FROM lease WHERE expires_ms <= $1))",
        )
        .bind(now)
        .fetch_one(&mut file.sqlite)
        .await?;
        let counters = if holds_keys { Some(self.advance(file).await?) } else { None };
        for statement in [
            "DELETE FROM kv WHERE lease IN (SELECT id FROM lease WHERE expires_ms <= $1)",
            "DELETE FROM lease WHERE expires_ms <= $1",
        ] {
            sqlx::query(statement).bind(now).execute(&mut file.sqlite).await?;
        }
        file.end("COMMIT").await?;
        if let Some(counters) = counters {
            self.announce(file, counters);
        }
        let next: Option<i64> =
            sqlx::query_scalar("SELECT min(expires_ms) FROM lease").fetch_one(&mut file.sqlite).await?;
        Ok(next.unwrap_or(i64::MAX))
    }

    /// Up to `limit` events of `keys` from `position` up to and including revision `latest`.
    pub(super) async fn history(
        &self,
        keys: &Keys,
        position: &Position,
        latest: Revision,
        limit: usize,
    ) -> Result<Vec<Event>, KvError> {
        const TO_THE_LAST: &str = "SELECT revision, key, deleted FROM history
            WHERE (revision, key) >= ($1, $2) AND revision <= $3 AND key >= $4
            ORDER BY revision, key LIMIT $5";
        const TO_THE_END: &str = "SELECT revision, key, deleted FROM history
            WHERE (revision, key) >= ($1, $2) AND revision <= $3 AND key >= $4 AND key < $6
            ORDER BY revision, key LIMIT $5";
        let mut file = self.hold().await?;
        still_kept(file.compacted, position.revision)?;
        let mut query = sqlx::query_as(if keys.end.is_some() { TO_THE_END } else { TO_THE_LAST })
            .bind(position.revision.cast_signed())
            .bind(position.key.as_slice())
            .bind(latest.cast_signed())
            .bind(keys.start.as_slice())
            .bind(as_limit(limit));
        if let Some(end) = &keys.end {
            query = query.bind(end.as_slice());
        }
        let rows: Vec<(i64, Vec<u8>, bool)> =
            query.fetch_all(&mut file.sqlite).await.map_err(self.failed("reading history"))?;
        Ok(rows
            .into_iter()
            .map(|(revision, key, deleted)| Event { key, revision: revision.cast_unsigned(), deleted })
            .collect())
    }

    pub(super) fn failed(&self, doing: &'static str) -> impl Fn(sqlx::Error) -> KvError {
        move |error| file::explain(&self.path, doing, &error)
    }
}

impl Owned {
    async fn begin(&mut self) -> sqlx::Result<()> {
        self.in_transaction = true;
        self.run("BEGIN IMMEDIATE").await
    }

    /// Ends the transaction by `COMMIT` or `ROLLBACK`. Not by sqlx's own guard: that one counts how deep it is in
    /// transactions, and loses count where SQLite rolls back by itself.
    async fn end(&mut self, how: &'static str) -> sqlx::Result<()> {
        self.run(how).await?;
        self.in_transaction = false;
        Ok(())
    }

    pub(super) async fn run(&mut self, statement: &'static str) -> sqlx::Result<()> {
        sqlx::query(statement).execute(&mut self.sqlite).await.map(|_| ())
    }

    async fn holds(&mut self, comparison: &Compare) -> sqlx::Result<bool> {
        let Compare::ModRevision(key, expected) = comparison;
        let found: Option<i64> = sqlx::query_scalar("SELECT mod_revision FROM kv WHERE key = $1")
            .bind(key.as_slice())
            .fetch_optional(&mut self.sqlite)
            .await?;
        Ok(found.unwrap_or(0).cast_unsigned() == *expected)
    }

    async fn has_lease(&mut self, lease: LeaseId) -> sqlx::Result<bool> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM lease WHERE id = $1)")
            .bind(lease.cast_signed())
            .fetch_one(&mut self.sqlite)
            .await
    }

    /// Gives one key its new value, or none; whether that changed anything.
    async fn write(&mut self, revision: Revision, key: Vec<u8>, value: Option<Value>) -> sqlx::Result<bool> {
        let query = match value {
            Some(Value { bytes, lease }) => sqlx::query(
                "INSERT INTO kv (key, value, create_revision, mod_revision, lease) VALUES ($1, $2, $3, $3, $4)
                 ON CONFLICT (key) DO UPDATE
                 SET value = excluded.value, mod_revision = excluded.mod_revision, lease = excluded.lease",
            )
            .bind(key)
            .bind(bytes)
            .bind(revision.cast_signed())
            .bind(lease.map(u64::cast_signed)),
            None => sqlx::query("DELETE FROM kv WHERE key = $1").bind(key),
        };
        Ok(query.execute(&mut self.sqlite).await?.rows_affected() > 0)
    }
}

struct Value {
    bytes: Vec<u8>,
    lease: Option<LeaseId>,
}

/// What each key becomes; `None`: deleted.
type Writes = BTreeMap<Vec<u8>, Option<Value>>;

/// The last write of a key counts, so that a key changes once per revision.
fn by_key(writes: Vec<Write>) -> Writes {
    let pair = |write| match write {
        Write::Put { key, value, lease } => (key, Some(Value { bytes: value, lease })),
        Write::Delete { key } => (key, None),
    };
    writes.into_iter().map(pair).collect()
}

/// Whether the history still holds all that revision `asked` changed.
pub(super) fn still_kept(compacted: Revision, asked: Revision) -> Result<(), KvError> {
    if asked > compacted {
        return Ok(());
    }
    Err(KvError::Compacted { asked, oldest: compacted.saturating_add(1) })
}

pub(super) fn as_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

pub(super) fn closed() -> KvError {
    KvError::Unavailable {
        doing: "using the file",
        cause: "it is closed; the broker is shutting down".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::super::Embedded;
    use super::*;
    use crate::clock::ManualClock;
    use crate::kv::Kv;

    async fn store(folder: &tempfile::TempDir) -> Embedded {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        Embedded::open(&folder.path().join("claviger.db"), clock).await.unwrap()
    }

    fn put(key: &str) -> Transaction {
        Transaction { compare: Vec::new(), write: vec![Write::put(key, "value")] }
    }

    fn value() -> Option<Value> {
        Some(Value { bytes: b"value".to_vec(), lease: None })
    }

    #[tokio::test]
    async fn a_commit_whose_caller_is_gone_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder).await;
        tokio::select! {
            biased;
            _ = kv.commit(put("a")) => panic!("done before its task could run"),
            () = std::future::ready(()) => {}
        }
        while kv.last_revision() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(kv.get(b"a").await.unwrap().unwrap().mod_revision, 1);
        assert_eq!(kv.commit(put("b")).await.unwrap().revision, 2);
    }

    #[tokio::test]
    async fn a_lost_transaction_is_rolled_back_by_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder).await;
        let mut file = kv.inner.hold().await.unwrap();
        file.begin().await.unwrap();
        let (revision, _) = kv.inner.advance(&mut file).await.unwrap();
        file.write(revision, b"a".to_vec(), value()).await.unwrap();
        drop(file);
        assert_eq!(kv.get(b"a").await.unwrap(), None);
        assert_eq!(kv.revision().await.unwrap(), 0);
        assert_eq!(kv.commit(put("b")).await.unwrap().revision, 1);
    }

    #[tokio::test]
    async fn a_commit_that_nobody_saw_counts() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder).await;
        let mut file = kv.inner.hold().await.unwrap();
        file.begin().await.unwrap();
        let (revision, _) = kv.inner.advance(&mut file).await.unwrap();
        file.write(revision, b"a".to_vec(), value()).await.unwrap();
        file.run("COMMIT").await.unwrap();
        drop(file);
        assert_eq!(kv.revision().await.unwrap(), 1);
        assert_eq!(kv.last_revision(), 1);
        assert_eq!(kv.commit(put("b")).await.unwrap().revision, 2);
    }

    #[tokio::test]
    async fn a_full_disk_costs_the_transaction_and_nothing_more() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder).await;
        kv.commit(put("a")).await.unwrap();
        let large = || Transaction { compare: Vec::new(), write: vec![Write::put("b", vec![7_u8; 200_000])] };
        // SQLite refuses a bound below the present size by keeping that size, so 1 means: not a page more.
        kv.inner.hold().await.unwrap().run("PRAGMA max_page_count = 1").await.unwrap();
        let error = kv.commit(large()).await.unwrap_err();
        assert!(matches!(error, KvError::Unavailable { doing: "committing", .. }), "{error}");
        assert_eq!(kv.last_revision(), 1);
        assert!(kv.get(b"b").await.unwrap().is_none());
        kv.inner.hold().await.unwrap().run("PRAGMA max_page_count = 1000000").await.unwrap();
        assert_eq!(kv.commit(large()).await.unwrap().revision, 2);
        assert_eq!(kv.get(b"b").await.unwrap().unwrap().value.len(), 200_000);
    }

    #[tokio::test]
    async fn no_lease_means_no_transaction() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder).await;
        kv.get(b"a").await.unwrap();
        assert_eq!(kv.inner.next_expiry.load(Ordering::Acquire), i64::MAX);
        assert!(!kv.inner.is_due());
    }

    #[test]
    fn the_last_write_of_a_key_counts() {
        let writes = by_key(vec![
            Write::put("a", "1"),
            Write::put("b", "1"),
            Write::delete("a"),
            Write::put("b", "2"),
        ]);
        let values: Vec<_> =
            writes.values().map(|value| value.as_ref().map(|value| value.bytes.clone())).collect();
        assert_eq!(values, [None, Some(b"2".to_vec())]);
    }

    #[test]
    fn shared_between_threads() {
        fn assert<T: Send + Sync>() {}
        assert::<Arc<Inner>>();
    }
}
