//! The file: who may have it, whether it is ours, and how it is laid out.
//!
//! ```text
//! claviger.db         0600   SQLite; application id "Clav", user version = schema
//! claviger.db-wal     0600   SQLite gives it the mode of the file beside it
//! claviger.db.lock    0600   empty; flock(2) on it for as long as the store is open
//!
//! meta     one row: the last revision, and the last one whose history is gone
//! kv       what is there now ──┐ triggers write one history row per changed key,
//! history  what changed when ◀─┘ so no change can be made without its event
//! lease    until when
//! ```

use std::fs::{File, Metadata, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, FlockOperation, OFlags};
use rustix::io::Errno;
use sqlx::ConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteLockingMode};

use crate::kv::KvError;

/// `Clav`, in the header of the file (SQLite file format, section 1.3.1).
const APPLICATION_ID: i64 = 0x436c_6176;
/// The layout below. A change of it is a new number and a migration from the old one.
const SCHEMA_VERSION: i64 = 1;
/// An SQLite file is either empty or holds at least this header.
const HEADER_BYTES: u64 = 100;
/// How long a predecessor within this process may take to close the file after it was dropped.
const BUSY: Duration = Duration::from_secs(5);

const SCHEMA: &str = "
BEGIN IMMEDIATE;
CREATE TABLE meta (
    only_row  INTEGER PRIMARY KEY CHECK (only_row = 1),
    revision  INTEGER NOT NULL,
    compacted INTEGER NOT NULL
) STRICT;
INSERT INTO meta VALUES (1, 0, 0);
CREATE TABLE lease (
    id         INTEGER PRIMARY KEY AUTOINCREMENT, -- a number is never used again
    ttl_ms     INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL                   -- Unix time
) STRICT;
CREATE TABLE kv (
    key             BLOB NOT NULL PRIMARY KEY,
    value           BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    mod_revision    INTEGER NOT NULL,
    lease           INTEGER REFERENCES lease (id)
) STRICT, WITHOUT ROWID;
CREATE INDEX kv_by_lease ON kv (lease) WHERE lease IS NOT NULL;
CREATE TABLE history (
    revision INTEGER NOT NULL,
    key      BLOB NOT NULL,
    deleted  INTEGER NOT NULL,
    PRIMARY KEY (revision, key)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER kv_inserted AFTER INSERT ON kv BEGIN
    INSERT INTO history VALUES (NEW.mod_revision, NEW.key, 0);
END;
CREATE TRIGGER kv_updated AFTER UPDATE ON kv BEGIN
    INSERT INTO history VALUES (NEW.mod_revision, NEW.key, 0);
END;
CREATE TRIGGER kv_deleted AFTER DELETE ON kv BEGIN
    INSERT INTO history SELECT revision, OLD.key, 1 FROM meta;
END;
CREATE TRIGGER meta_compacted AFTER UPDATE OF compacted ON meta BEGIN
    DELETE FROM history WHERE revision <= NEW.compacted;
END;
PRAGMA application_id = 1131176310;
PRAGMA user_version = 1;
COMMIT;
";

/// Takes the file for this process, until the returned lock file is closed or the process ends, however it ends.
///
/// The lock is on a file of its own: closing any descriptor of the database would drop SQLite's own POSIX locks on
/// it, and a broker that was killed must leave nothing behind that someone has to clean up.
///
/// # Errors
/// [`KvError::Locked`] where it is taken, also by another store of this process; [`KvError::BadFile`].
pub(super) fn claim(database: &Path) -> Result<File, KvError> {
    let path = beside(database, ".lock");
    inspect(&path)?;
    let lock = create(&path, OpenOptions::new().create(true).truncate(false))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => Err(locked(database)),
        Err(error) => Err(unavailable(&path, error)),
    }
}

/// Whether somebody has the database open, and so has [`claim`]ed it. Changes nothing.
///
/// # Errors
/// [`KvError::BadFile`] and [`KvError::Unavailable`] for what opening it would refuse at sight: owner, mode, kind of
/// file, and what this process may not write.
pub(crate) fn is_taken(database: &Path) -> Result<bool, KvError> {
    inspect_database(database)?;
    let lock = beside(database, ".lock");
    let claimed = inspect(&lock)?;
    for path in [database, &beside(database, "-wal"), &lock] {
        // Not opened: closing it would drop the locks that this process may have on it.
        match rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(unavailable(path, error)),
        }
    }
    if claimed.is_none() {
        return Ok(false);
    }
    let held = create(&lock, &mut OpenOptions::new())?;
    // Shared, so that two who look see nothing of each other; let go with the descriptor.
    match rustix::fs::flock(&held, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(unavailable(&lock, error)),
    }
}

/// Opens the database, and creates it where there is none. Needs the [`claim`].
///
/// # Errors
/// [`KvError::BadFile`] for a file that is open to others, is another program's, damaged, or too new; such a file is
/// left as it was.
pub(super) async fn connect(path: &Path) -> Result<SqliteConnection, KvError> {
    if inspect_database(path)?.is_none() {
        drop(create(path, OpenOptions::new().create_new(true))?);
    }
    prepare(path).await.map_err(|failure| match failure {
        Failure::Refused(problem) => bad(path, problem),
        Failure::Sqlite(error) => explain(path, "opening the file", &error),
    })
}

enum Failure {
    Refused(String),
    Sqlite(sqlx::Error),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Sqlite(error)
    }
}

async fn prepare(path: &Path) -> Result<SqliteConnection, Failure> {
    // Exclusive locking before the first access: the index of the write-ahead log then stays in memory, and no -shm
    // file is made (SQLite, "WAL-mode without shared memory").
    let mut sqlite = SqliteConnectOptions::new()
        .filename(path)
        .locking_mode(SqliteLockingMode::Exclusive)
        .foreign_keys(true)
        .busy_timeout(BUSY)
        .disable_statement_logging()
        .connect()
        .await?;
    // INVARIANT: nothing is written to a file before it is known to be ours or empty.
    let empty = identify(&mut sqlite).await?;
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode = WAL").fetch_one(&mut sqlite).await?;
    if mode != "wal" {
        return Err(Failure::Refused(format!(
            "is on a file system that can't hold a write-ahead log (SQLite offers `{mode}`); use a local disk"
        )));
    }
    sqlx::raw_sql("PRAGMA synchronous = FULL; PRAGMA secure_delete = ON").execute(&mut sqlite).await?;
    if empty {
        sqlx::raw_sql(SCHEMA).execute(&mut sqlite).await?;
    }
    Ok(sqlite)
}

/// Whether the file is empty; refuses one that is neither empty nor ours.
async fn identify(sqlite: &mut SqliteConnection) -> Result<bool, Failure> {
    let application: i64 = sqlx::query_scalar("PRAGMA application_id").fetch_one(&mut *sqlite).await?;
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *sqlite).await?;
    let tables: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sqlite_schema").fetch_one(&mut *sqlite).await?;
    match (application, version) {
        (APPLICATION_ID, SCHEMA_VERSION) => Ok(false),
        (0, 0) if tables == 0 => Ok(true),
        (APPLICATION_ID, newer) if newer > SCHEMA_VERSION => Err(Failure::Refused(format!(
            "has schema {newer}, and this build knows schemas up to {SCHEMA_VERSION}; run the newer claviger"
        ))),
        (APPLICATION_ID, _) => Err(Failure::Refused(format!("has no valid schema version; {RESTORE}"))),
        _ => Err(Failure::Refused(format!(
            "is a database of another program (application id {application:#010x}); name another file"
        ))),
    }
}

const RESTORE: &str = "restore it from a backup or name another file";

/// As [`inspect`]; refuses a file, too, that is too short to be a database and not empty.
fn inspect_database(path: &Path) -> Result<Option<Metadata>, KvError> {
    let found = inspect(path)?;
    match found.as_ref().map(Metadata::len) {
        Some(length @ 1..HEADER_BYTES) => {
            Err(bad(path, format!("is {length} bytes long and no database; {RESTORE}")))
        }
        _ => Ok(found),
    }
}

/// What stands at `path`, if anything does; refuses what is not a private file of our own.
fn inspect(path: &Path) -> Result<Option<Metadata>, KvError> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unavailable(path, error)),
    };
    let us = rustix::process::geteuid().as_raw();
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    let problem = if found.is_symlink() {
        "is a symbolic link; name the file that it points at".to_owned()
    } else if !found.is_file() {
        "is not a regular file; name another path".to_owned()
    } else if owner != us {
        format!(
            "belongs to user {owner}, and claviger runs as user {us}; change its owner or run as that user"
        )
    } else if mode & 0o077 != 0 {
        format!("is open to other users (mode {mode:04o}); run `chmod 600` on it")
    } else {
        return Ok(Some(found));
    };
    Err(bad(path, problem))
}

/// Opens a file so that a new one is 0600 from its first instant, and a link put there meanwhile is not followed.
fn create(path: &Path, options: &mut OpenOptions) -> Result<File, KvError> {
    let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(no_follow)
        .open(path)
        .map_err(|error| unavailable(path, error))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What an SQLite failure means to the one who started the broker.
pub(super) fn explain(path: &Path, doing: &'static str, error: &sqlx::Error) -> KvError {
    // Primary result codes (SQLite, "Result and Error Codes").
    const SQLITE_BUSY: i32 = 5;
    const SQLITE_CORRUPT: i32 = 11;
    const SQLITE_NOTADB: i32 = 26;
    let code = error.as_database_error().and_then(|error| error.code()?.parse::<i32>().ok());
    match code.map(|extended| extended & 0xff) {
        Some(SQLITE_BUSY) => locked(path),
        Some(SQLITE_CORRUPT) => bad(path, format!("is damaged ({error}); {RESTORE}")),
        Some(SQLITE_NOTADB) => bad(path, format!("is not a database; {RESTORE}")),
        _ => KvError::Unavailable { doing, cause: format!("{}: {error}", path.display()) },
    }
}

fn locked(path: &Path) -> KvError {
    KvError::Locked { path: path.display().to_string() }
}

fn bad(path: &Path, problem: String) -> KvError {
    KvError::BadFile { path: path.display().to_string(), problem }
}

/// The file system's failure at `path`.
pub(super) fn unavailable(path: &Path, error: impl std::fmt::Display) -> KvError {
    KvError::Unavailable { doing: "opening the file", cause: format!("{}: {error}", path.display()) }
}
