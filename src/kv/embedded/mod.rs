//! The key-value layer in one SQLite file of this process.
//!
//! ```text
//! mod.rs      what a caller sees        engine.rs   transactions, leases, history
//! watch.rs    a position in history     file.rs     lock, permissions, whose file it is, schema
//! ```
//!
//! One connection does everything, one operation at a time, and a lock that only this process can hold makes that the
//! whole truth: a revision is a counter, a comparison is a read, and a watch needs no more than a table of what
//! changed when.

mod engine;
mod file;
mod watch;

pub(crate) use file::is_taken;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Connection;
use tokio::sync::Mutex;

use self::engine::{Inner, Owned, as_limit, counters, still_kept};
use self::watch::{Keys, Watcher};
use super::{Entry, Kv, KvError, LeaseId, Outcome, Page, Revision, Transaction, Watch};
use crate::clock::SharedClock;

/// A key.
const ONE: &str = "SELECT key, value, create_revision, mod_revision, lease FROM kv WHERE key = $1";
/// Keys from one on.
const TO_THE_LAST: &str = "SELECT key, value, create_revision, mod_revision, lease FROM kv
    WHERE key >= $1 ORDER BY key LIMIT $2";
/// Keys from one on, before another.
const TO_THE_END: &str = "SELECT key, value, create_revision, mod_revision, lease FROM kv
    WHERE key >= $1 AND key < $3 ORDER BY key LIMIT $2";

/// What may be chosen about an embedded store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// For how many revisions watches can look back; at least 1, default 10,000.
    pub history: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { history: 10_000 }
    }
}

/// A key-value store in one SQLite file. Cheap to clone; clones are one store.
///
/// Durable: a commit that returned is on the disk (write-ahead log, `synchronous = FULL`). Deleted values are
/// overwritten in the file (`secure_delete`); older copies in the log go with it, at the latest on
/// [`close`](Self::close).
///
/// Leases end by wall-clock time, because they outlive the process: a clock that is set back prolongs them, one that
/// is set forward ends them early. They are ended by the next operation, or by [`expire`](Self::expire).
///
/// A transaction that writes one key several times does only the last of these writes.
#[derive(Clone)]
pub struct Embedded {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").field("path", &self.inner.path).finish_non_exhaustive()
    }
}

impl Embedded {
    /// Opens the file at `path` for this process alone, and creates it (mode 0600) where there is none. The folder
    /// must exist.
    ///
    /// # Errors
    /// [`KvError::Locked`] where it is open already, in another process or in this one; [`KvError::BadFile`] where
    /// it is not ours, too new, damaged, a link, or open to other users; [`KvError::Unavailable`].
    pub async fn open(path: &Path, clock: SharedClock) -> Result<Self, KvError> {
        Self::open_with(path, clock, Settings::default()).await
    }

    /// As [`open`](Self::open), with other settings than the default ones.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_with(path: &Path, clock: SharedClock, settings: Settings) -> Result<Self, KvError> {
        // Absolute, so that no name means something special to SQLite (`:memory:`, `file:…`).
        let path = std::path::absolute(path).map_err(|error| file::unavailable(path, error))?;
        let lock = file::claim(&path)?;
        let mut sqlite = file::connect(&path).await?;
        let (revision, compacted) = counters(&mut sqlite)
            .await
            .map_err(|error| file::explain(&path, "reading the revision", &error))?;
        let (latest, _) = tokio::sync::watch::channel(revision);
        let inner = Inner {
            path,
            clock,
            history: i64::from(settings.history.max(1)),
            revision: AtomicU64::new(revision),
            next_expiry: AtomicI64::new(i64::MIN),
            file: Mutex::new(Some(Owned { sqlite, in_transaction: false, compacted, latest, lock })),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The revision of the last change, without waiting for anything.
    #[must_use]
    pub fn last_revision(&self) -> Revision {
        self.inner.revision.load(Ordering::Acquire)
    }

    /// Ends the leases whose time is over and removes their keys, so that watchers hear of it although nobody else
    /// uses the store. Costs nothing where none is due.
    ///
    /// # Errors
    /// [`KvError::Unavailable`].
    pub async fn expire(&self) -> Result<(), KvError> {
        if !self.inner.is_due() {
            return Ok(());
        }
        let inner = Arc::clone(&self.inner);
        to_the_end(async move {
            let mut file = inner.hold().await?;
            inner.end_leases(&mut file).await
        })
        .await
    }

    /// Moves the write-ahead log into the file, closes it and sets it free for others. Watches end with an error, and
    /// so does every later call; closing again is none.
    ///
    /// A store that is dropped without it loses nothing: the log is read when the file is next opened.
    ///
    /// # Errors
    /// [`KvError::Unavailable`]; the file is closed all the same.
    pub async fn close(&self) -> Result<(), KvError> {
        let Some(mut file) = self.inner.file.lock().await.take() else { return Ok(()) };
        if file.in_transaction {
            // Fails where there is none any more.
            let _ = file.run("ROLLBACK").await;
        }
        let Owned { mut sqlite, lock, .. } = file;
        let saved = sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut sqlite).await;
        let closed = sqlite.close().await;
        drop(lock);
        saved.and(closed).map_err(self.inner.failed("closing the file"))
    }
}

#[async_trait]
impl Kv for Embedded {
    async fn get(&self, key: &[u8]) -> Result<Option<Entry>, KvError> {
        self.expire().await?;
        let mut file = self.inner.hold().await?;
        let row: Option<Row> = sqlx::query_as(ONE)
            .bind(key)
            .fetch_optional(&mut file.sqlite)
            .await
            .map_err(self.inner.failed("reading"))?;
        Ok(row.map(entry))
    }

    async fn range(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Page, KvError> {
        let Keys { start, end } = Keys::under(prefix).after(after);
        self.expire().await?;
        let mut file = self.inner.hold().await?;
        let mut query = sqlx::query_as(if end.is_some() { TO_THE_END } else { TO_THE_LAST })
            .bind(start)
            .bind(as_limit(limit.saturating_add(1)));
        if let Some(end) = end {
            query = query.bind(end);
        }
        let mut rows: Vec<Row> =
            query.fetch_all(&mut file.sqlite).await.map_err(self.inner.failed("reading a range"))?;
        let more = rows.len() > limit;
        rows.truncate(limit);
        Ok(Page { entries: rows.into_iter().map(entry).collect(), more, revision: self.last_revision() })
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, KvError> {
        let inner = Arc::clone(&self.inner);
        to_the_end(async move {
            let mut file = inner.hold().await?;
            inner.end_leases(&mut file).await?;
            inner.apply(&mut file, transaction).await
        })
        .await
    }

    async fn watch(&self, prefix: &[u8], from: Revision) -> Result<Watch, KvError> {
        self.expire().await?;
        let file = self.inner.hold().await?;
        let from = from.max(1);
        still_kept(file.compacted, from)?;
        Ok(Watcher::new(&self.inner, file.latest.subscribe(), prefix, from).into_stream())
    }

    async fn revision(&self) -> Result<Revision, KvError> {
        self.expire().await?;
        let _file = self.inner.hold().await?;
        Ok(self.last_revision())
    }

    async fn lease(&self, ttl: Duration) -> Result<LeaseId, KvError> {
        /// So long that it is for ever, and no sum with a time overflows.
        const LONGEST: i64 = i64::MAX / 2;
        let ttl = i64::try_from(ttl.as_millis()).unwrap_or(LONGEST).min(LONGEST);
        let mut file = self.inner.hold().await?;
        let expires = self.inner.now().saturating_add(ttl);
        // Before the row is there: when this is cancelled between the two, the time is too early, not too late.
        self.inner.next_expiry.fetch_min(expires, Ordering::AcqRel);
        let inserted = sqlx::query("INSERT INTO lease (ttl_ms, expires_ms) VALUES ($1, $2)")
            .bind(ttl)
            .bind(expires)
            .execute(&mut file.sqlite)
            .await
            .map_err(self.inner.failed("taking a lease"))?;
        Ok(inserted.last_insert_rowid().cast_unsigned())
    }

    async fn renew(&self, lease: LeaseId) -> Result<(), KvError> {
        let mut file = self.inner.hold().await?;
        let renewed =
            sqlx::query("UPDATE lease SET expires_ms = $2 + ttl_ms WHERE id = $1 AND expires_ms > $2")
                .bind(lease.cast_signed())
                .bind(self.inner.now())
                .execute(&mut file.sqlite)
                .await
                .map_err(self.inner.failed("renewing a lease"))?;
        if renewed.rows_affected() == 0 { Err(KvError::LeaseNotFound { id: lease }) } else { Ok(()) }
    }

    async fn release(&self, lease: LeaseId) -> Result<(), KvError> {
        let mut file = self.inner.hold().await?;
        self.inner.next_expiry.store(i64::MIN, Ordering::Release);
        sqlx::query("UPDATE lease SET expires_ms = $2 WHERE id = $1")
            .bind(lease.cast_signed())
            .bind(i64::MIN)
            .execute(&mut file.sqlite)
            .await
            .map_err(self.inner.failed("releasing a lease"))?;
        drop(file);
        self.expire().await
    }
}

/// Key, value, create revision, mod revision, lease.
type Row = (Vec<u8>, Vec<u8>, i64, i64, Option<i64>);

fn entry((key, value, created, modified, lease): Row) -> Entry {
    Entry {
        key,
        value,
        create_revision: created.cast_unsigned(),
        mod_revision: modified.cast_unsigned(),
        lease: lease.map(i64::cast_unsigned),
    }
}

/// Runs `work` to its end, also when the caller goes away before.
async fn to_the_end<T, F>(work: F) -> Result<T, KvError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, KvError>> + Send + 'static,
{
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(KvError::Unavailable { doing: "finishing a transaction", cause: error.to_string() })
    })
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use jiff::Timestamp;

    use super::super::Write;
    use super::*;
    use crate::clock::ManualClock;

    async fn store(folder: &tempfile::TempDir, history: u32) -> Embedded {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        Embedded::open_with(&folder.path().join("claviger.db"), clock, Settings { history }).await.unwrap()
    }

    async fn put(kv: &Embedded, key: &str) -> Revision {
        let transaction = Transaction { compare: Vec::new(), write: vec![Write::put(key, "value")] };
        kv.commit(transaction).await.unwrap().revision
    }

    #[tokio::test]
    async fn history_goes_back_as_far_as_set() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 3).await;
        for _ in 0..5 {
            put(&kv, "a").await;
        }
        let error = kv.watch(b"", 2).await.err().unwrap();
        assert!(matches!(error, KvError::Compacted { asked: 2, oldest: 3 }), "{error}");
        let past = kv.watch(b"", 3).await.unwrap().take(3);
        let revisions: Vec<_> = past.map(|event| event.unwrap().revision).collect().await;
        assert_eq!(revisions, [3, 4, 5]);
    }

    #[tokio::test]
    async fn a_watcher_that_falls_behind_is_told_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 3).await;
        put(&kv, "a").await;
        let mut watch = kv.watch(b"", 1).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap().revision, 1);
        for _ in 0..9 {
            put(&kv, "a").await;
        }
        let error = watch.next().await.unwrap().unwrap_err();
        assert!(matches!(error, KvError::Compacted { asked: 2, oldest: 8 }), "{error}");
        assert!(watch.next().await.is_none());
    }

    #[tokio::test]
    async fn more_events_than_a_batch_in_one_revision() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 10).await;
        let write = (0..1_000).map(|n| Write::put(format!("{n:04}"), "value")).collect();
        kv.commit(Transaction { compare: Vec::new(), write }).await.unwrap();
        put(&kv, "last").await;
        let events: Vec<_> = kv.watch(b"", 1).await.unwrap().take(1_001).map(Result::unwrap).collect().await;
        for (n, event) in events.iter().take(1_000).enumerate() {
            assert_eq!((event.key.as_slice(), event.revision), (format!("{n:04}").as_bytes(), 1));
        }
        assert_eq!(events.last().unwrap().revision, 2);
    }

    #[tokio::test]
    async fn a_closed_store_says_so_and_ends_its_watches() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 10).await;
        put(&kv, "a").await;
        let mut watch = kv.watch(b"", 2).await.unwrap();
        kv.close().await.unwrap();
        assert!(matches!(watch.next().await, Some(Err(KvError::Unavailable { .. }))));
        assert!(watch.next().await.is_none());
        assert!(matches!(kv.get(b"a").await, Err(KvError::Unavailable { .. })));
        assert!(matches!(kv.lease(Duration::ZERO).await, Err(KvError::Unavailable { .. })));
        assert_eq!(kv.last_revision(), 1);
        kv.close().await.unwrap();
        assert!(store(&folder, 10).await.get(b"a").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_watch_does_not_keep_a_dropped_store_open() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 10).await;
        put(&kv, "a").await;
        let mut watch = kv.watch(b"", 2).await.unwrap();
        drop(kv);
        assert!(matches!(watch.next().await, Some(Err(KvError::Unavailable { .. }))));
        assert!(store(&folder, 10).await.get(b"a").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn reads_go_down_the_primary_key_and_never_through_the_table() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 10).await;
        let mut file = kv.inner.hold().await.unwrap();
        for (query, keys) in [(ONE, "(key=?)"), (TO_THE_LAST, "(key>?)"), (TO_THE_END, "(key>? AND key<?)")] {
            let plan = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {query}"));
            let steps: Vec<(i64, i64, i64, String)> = sqlx::query_as(plan)
                .bind(b"a".as_slice())
                .bind(1_i64)
                .bind(b"b".as_slice())
                .fetch_all(&mut file.sqlite)
                .await
                .unwrap();
            let steps: Vec<_> = steps.into_iter().map(|(.., step)| step).collect();
            // One step: it needs no sorting either.
            assert_eq!(steps, [format!("SEARCH kv USING PRIMARY KEY {keys}")], "{query}");
        }
    }

    #[tokio::test]
    async fn the_longest_lease_does_not_overflow() {
        let folder = tempfile::tempdir().unwrap();
        let kv = store(&folder, 10).await;
        let lease = kv.lease(Duration::MAX).await.unwrap();
        kv.renew(lease).await.unwrap();
        assert!(matches!(kv.renew(u64::MAX).await, Err(KvError::LeaseNotFound { id: u64::MAX })));
    }
}
