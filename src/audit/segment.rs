//! Files: an instance's folder and its lock, the segment that is written to, and bounded reading.
//!
//! ```text
//!              0                    synced              synced + unsynced
//!   segment    ├────────────────────┼───────────────────┤
//!              known to be on disk    written and acknowledged, kept in memory as well
//! ```
//!
//! INVARIANT: between two calls the file ends where `unsynced` ends, or the segment is `damaged`. After a failed sync
//! the kernel may have dropped what it called written, so nothing behind `synced` is believed: the file is opened
//! anew, cut back to `synced`, and what was acknowledged is written again from memory.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use ring::digest;
use rustix::fs::OFlags;

use super::AuditError;
use super::chain::{ChainHash, Frame, Head, MAX_LINE};

const SUFFIX: &str = ".jsonl";
const LOCK: &str = "lock";
const READ_AT_ONCE: usize = 64 << 10;

/// A line with its newline, and a byte more to tell that it is too long.
const LINE_LIMIT: u64 = MAX_LINE as u64 + 2;

/// The name of the segment whose first record has the sequence `first`.
pub(super) fn file_name(first: u64) -> String {
    format!("{first:020}{SUFFIX}")
}

/// Whether text names an instance: 1–64 of `A-Za-z0-9._-`, the first not a dot.
pub(super) fn is_instance(text: &str) -> bool {
    let permitted = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(permitted) && !text.starts_with('.')
}

/// The segments of a folder.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The first sequences that the names say, in order.
    pub(super) segments: Vec<u64>,
    /// Names that end like a segment's and are none.
    pub(super) strangers: Vec<String>,
}

/// Lists a folder's segments.
pub(super) fn list(folder: &Path) -> Result<Listing, AuditError> {
    let mut listing = Listing::default();
    let entries = fs::read_dir(folder).map_err(|error| unreadable(folder, &error))?;
    for entry in entries {
        let name =
            entry.map_err(|error| unreadable(folder, &error))?.file_name().to_string_lossy().into_owned();
        let Some(digits) = name.strip_suffix(SUFFIX) else { continue };
        match digits.parse() {
            Ok(first) if file_name(first) == name => listing.segments.push(first),
            _ => listing.strangers.push(name),
        }
    }
    listing.segments.sort_unstable();
    listing.strangers.sort_unstable();
    Ok(listing)
}

pub(super) fn unavailable(path: &Path, cause: &io::Error) -> AuditError {
    AuditError::Unavailable { path: path.display().to_string(), cause: cause.to_string() }
}

pub(super) fn unreadable(path: &Path, cause: &io::Error) -> AuditError {
    AuditError::Unreadable { path: path.display().to_string(), cause: cause.to_string() }
}

/// An instance's folder, held by one writer.
#[derive(Debug)]
pub(super) struct Folder {
    directory: PathBuf,
    instance: String,
    path: PathBuf,
    handle: File,
    identity: Identity,
    /// Held until the folder is dropped; the kernel lets go of it when the process dies.
    _lock: File,
}

impl Folder {
    /// Makes the folder where it is missing, checks that no other user can write to it, and locks it.
    pub(super) fn open(directory: &Path, instance: &str) -> Result<Self, AuditError> {
        if !is_instance(instance) {
            let instance: String = instance.escape_debug().take(64).collect();
            let rule =
                "a name is 1-64 of A-Za-z0-9._- and does not start with a dot; give the broker another";
            let problem = format!("instance `{instance}`: {rule}");
            return Err(AuditError::Unusable { path: directory.display().to_string(), problem });
        }
        let path = directory.join(instance);
        // The log's folder may be a link to another disk; an instance's may not.
        private_folder(directory, OFlags::DIRECTORY)?;
        let handle = private_folder(&path, OFlags::DIRECTORY | OFlags::NOFOLLOW)?;
        let identity = handle.metadata().map(|metadata| Identity::of(&metadata));
        let identity = identity.map_err(|error| unavailable(&path, &error))?;
        let lock = lock(&path)?;
        Ok(Self {
            directory: directory.to_owned(),
            instance: instance.to_owned(),
            path,
            handle,
            identity,
            _lock: lock,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes and locks the folder again where its path no longer leads to it.
    pub(super) fn refresh(&mut self) -> Result<(), AuditError> {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| Identity::of(&metadata) == self.identity) {
            return Ok(());
        }
        *self = Self::open(&self.directory, &self.instance)?;
        Ok(())
    }

    /// A new, empty segment whose name is on the disk.
    pub(super) fn create(&self, first: u64) -> Result<Segment, AuditError> {
        let path = self.path.join(file_name(first));
        let file = match writable().create_new(true).mode(0o600).open(&path) {
            // An attempt that failed behind the creation left it: the folder is locked, so no one else did.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => writable()
                .open(&path)
                .and_then(|file| if file.metadata()?.len() == 0 { Ok(file) } else { Err(error) }),
            other => other,
        };
        let segment = file.and_then(|file| {
            self.handle.sync_all()?;
            Segment::new(path.clone(), file, 0)
        });
        segment.map_err(|error| unavailable(&path, &error))
    }

    /// The segment that begins with `first`, cut to `length` bytes and synced: what an earlier process wrote may
    /// never have reached the disk.
    pub(super) fn reopen(&self, first: u64, length: u64) -> Result<Segment, AuditError> {
        let path = self.path.join(file_name(first));
        let segment = writable().open(&path).and_then(|file| {
            if file.metadata()?.len() != length {
                file.set_len(length)?;
            }
            file.sync_all()?;
            Segment::new(path.clone(), file, length)
        });
        segment.map_err(|error| unavailable(&path, &error))
    }

    /// Removes a segment.
    pub(super) fn remove(&self, first: u64) -> io::Result<()> {
        fs::remove_file(self.path.join(file_name(first)))?;
        self.handle.sync_all()
    }

    /// How much of the disk is free for this process, in thousandths of what it may use; `None` where the kernel does
    /// not say.
    pub(super) fn free_permille(&self) -> Option<u32> {
        let disk = rustix::fs::fstatvfs(&self.handle).ok()?;
        let used = disk.f_blocks.checked_sub(disk.f_bfree)?;
        // What is kept back for root is neither used nor free.
        let all = used.checked_add(disk.f_bavail).filter(|all| *all > 0)?;
        u32::try_from(u128::from(disk.f_bavail) * 1_000 / u128::from(all)).ok()
    }

    /// When the newest record of a segment was written; `None` where its last line is damaged.
    pub(super) fn newest(&self, first: u64) -> io::Result<Option<Timestamp>> {
        let mut file = open_to_read(&self.path.join(file_name(first)))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LINE_LIMIT)))?;
        let mut tail = Vec::new();
        file.take(LINE_LIMIT).read_to_end(&mut tail)?;
        let line = tail.strip_suffix(b"\n").and_then(|tail| tail.rsplit(|byte| *byte == b'\n').next());
        Ok(line.and_then(Frame::parse).and_then(|frame| frame.timestamp()))
    }

    /// Where the chain stood before a segment's first record; `None` where that line is damaged.
    pub(super) fn before(&self, first: u64) -> Result<Option<Head>, AuditError> {
        let mut lines = LineReader::open(&self.path.join(file_name(first)))?;
        Ok(match lines.read()? {
            Some(Chunk::Line(line)) => Frame::parse(line)
                .filter(|frame| frame.is_authentic() && frame.seq == first)
                .map(|frame| Head { seq: first - 1, hash: frame.prev }),
            _ => None,
        })
    }
}

fn private_folder(path: &Path, flags: OFlags) -> Result<File, AuditError> {
    let opened = make_folder(path)
        .and_then(|()| OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path))
        .and_then(|handle| Ok((handle.metadata()?, handle)));
    let (metadata, handle) = opened.map_err(|error| unavailable(path, &error))?;
    let problem = if metadata.mode() & 0o022 != 0 {
        format!(
            "its group or others may write to it (mode {:04o}); run `chmod go-w` on it",
            metadata.mode() & 0o7777
        )
    } else if ![0, rustix::process::geteuid().as_raw()].contains(&metadata.uid()) {
        format!("it belongs to user {}, who could replace what is in it; run `chown` on it", metadata.uid())
    } else {
        return Ok(handle);
    };
    Err(AuditError::Unusable { path: path.display().to_string(), problem })
}

fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

fn lock(folder: &Path) -> Result<File, AuditError> {
    let path = folder.join(LOCK);
    let file = writable().create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|error| unavailable(&path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(AuditError::Locked { path: folder.display().to_string() }),
        Err(TryLockError::Error(error)) => Err(unavailable(&path, &error)),
    }
}

fn writable() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// The file that the log is writing to.
#[derive(Debug)]
pub(super) struct Segment {
    path: PathBuf,
    file: File,
    identity: Identity,
    synced: u64,
    unsynced: Vec<u8>,
    damaged: bool,
}

impl Segment {
    fn new(path: PathBuf, file: File, synced: u64) -> io::Result<Self> {
        let identity = Identity::of(&file.metadata()?);
        Ok(Self { path, file, identity, synced, unsynced: Vec::new(), damaged: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// How many bytes were acknowledged.
    pub(super) fn len(&self) -> u64 {
        self.synced + wide(self.unsynced.len())
    }

    /// What was done to the file behind the log's back; `None` where it is as it was left.
    pub(super) fn problem(&self) -> io::Result<Option<String>> {
        let found = match fs::symlink_metadata(&self.path) {
            Ok(found) => found,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Some("it was deleted or moved away".to_owned()));
            }
            Err(error) => return Err(error),
        };
        if Identity::of(&found) != self.identity {
            return Ok(Some("it was replaced by another file".to_owned()));
        }
        let (size, expected) = (found.len(), self.len());
        Ok(if size < self.synced || (size < expected && !self.damaged) {
            Some(format!("it was cut from {expected} to {size} bytes"))
        } else if size > expected && !self.damaged {
            Some(format!("it grew from {expected} to {size} bytes"))
        } else {
            None
        })
    }

    /// Writes `bytes` behind all that was acknowledged; with `sync` they, and all before them, are then on the disk.
    /// On an error they count as never written, and are removed now or by [`mend`](Self::mend).
    pub(super) fn append(&mut self, bytes: &[u8], sync: bool) -> io::Result<()> {
        let end = self.len();
        if let Err(error) = self.file.write_all_at(bytes, end) {
            // No sync has failed, so what was written before is still whole.
            self.damaged = true;
            if self.file.set_len(end).and_then(|()| self.file.sync_data()).is_ok() {
                self.settle(end);
            }
            return Err(error);
        }
        if !sync {
            self.unsynced.extend_from_slice(bytes);
            return Ok(());
        }
        if let Err(error) = self.file.sync_data() {
            self.damaged = true;
            // Where this fails as well, the next use tries again before it writes.
            let _ = self.mend();
            return Err(error);
        }
        self.settle(end + wide(bytes.len()));
        Ok(())
    }

    /// Brings what was written to the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.append(&[], true)
    }

    /// Puts the file back to what was acknowledged, after an error. Nothing may be appended before this succeeds.
    pub(super) fn mend(&mut self) -> io::Result<()> {
        if !self.damaged {
            return Ok(());
        }
        let file = writable().open(&self.path)?;
        let metadata = file.metadata()?;
        if Identity::of(&metadata) != self.identity || metadata.len() < self.synced {
            return Err(io::Error::other("the file is not the one that was written"));
        }
        file.set_len(self.synced)?;
        file.write_all_at(&self.unsynced, self.synced)?;
        file.sync_data()?;
        self.file = file;
        self.settle(self.len());
        Ok(())
    }

    fn settle(&mut self, length: u64) {
        self.synced = length;
        self.unsynced.clear();
        self.damaged = false;
    }
}

/// Opens a segment for reading: neither a link nor something that blocks.
fn open_to_read(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// Brings a segment to the disk, whoever wrote it.
pub(super) fn sync(path: &Path) -> Result<(), AuditError> {
    open_to_read(path).and_then(|file| file.sync_all()).map_err(|error| unavailable(path, &error))
}

/// The SHA-256 and number of a file's bytes from `offset` on.
pub(super) fn digest_from(path: &Path, offset: u64) -> io::Result<(ChainHash, u64)> {
    let mut file = open_to_read(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut reader = BufReader::with_capacity(READ_AT_ONCE, file);
    let mut context = digest::Context::new(&digest::SHA256);
    let mut total = 0;
    loop {
        let block = reader.fill_buf()?;
        if block.is_empty() {
            return Ok((ChainHash::finish(context), total));
        }
        context.update(block);
        let length = block.len();
        total += wide(length);
        reader.consume(length);
    }
}

/// A piece of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk<'a> {
    /// A line, without its newline.
    Line(&'a [u8]),
    /// The file's end, without a newline: so many bytes.
    Torn(u64),
    /// A line longer than [`MAX_LINE`], skipped. May be the file's end.
    TooLong,
}

/// Reads a segment line by line in bounded memory.
#[derive(Debug)]
pub(super) struct LineReader {
    path: PathBuf,
    file: BufReader<File>,
    line: Vec<u8>,
}

impl LineReader {
    pub(super) fn open(path: &Path) -> Result<Self, AuditError> {
        let file = open_to_read(path).map_err(|error| unreadable(path, &error))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(READ_AT_ONCE, file),
            line: Vec::new(),
        })
    }

    /// The next piece; `None` at the end.
    pub(super) fn read(&mut self) -> Result<Option<Chunk<'_>>, AuditError> {
        let length = self.fill().map_err(|error| unreadable(&self.path, &error))?;
        Ok(match self.line.strip_suffix(b"\n") {
            Some(line) if line.len() <= MAX_LINE => Some(Chunk::Line(line)),
            Some(_) => Some(Chunk::TooLong),
            None if length == 0 => None,
            None if length >= LINE_LIMIT => Some(Chunk::TooLong),
            None => Some(Chunk::Torn(length)),
        })
    }

    /// Reads up to a newline, keeps no more than [`LINE_LIMIT`] bytes of it and skips the rest.
    fn fill(&mut self) -> io::Result<u64> {
        self.line.clear();
        let kept = wide(self.file.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut self.line)?);
        if kept < LINE_LIMIT || self.line.ends_with(b"\n") {
            return Ok(kept);
        }
        Ok(kept + wide(self.file.skip_until(b'\n')?))
    }
}

/// A number of bytes in memory as one of bytes in a file.
fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn folder() -> (tempfile::TempDir, Folder) {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(&directory.path().join("audit"), "a").unwrap();
        (directory, folder)
    }

    fn content(segment: &Segment) -> Vec<u8> {
        fs::read(segment.path()).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn folders_and_files_are_private() {
        let (directory, folder) = folder();
        let segment = folder.create(1).unwrap();
        assert_eq!(segment.name(), "00000000000000000001.jsonl");
        assert_eq!(mode(&directory.path().join("audit")), 0o700);
        assert_eq!(mode(folder.path()), 0o700);
        assert_eq!(mode(segment.path()), 0o600);
    }

    #[test]
    fn a_folder_that_others_write_to_is_refused() {
        for name in ["audit", "audit/a"] {
            let (directory, open) = folder();
            drop(open);
            let path = directory.path().join(name);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o720)).unwrap();
            let error = Folder::open(&directory.path().join("audit"), "a").unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidConfig, "{error}");
            assert!(error.to_string().contains("0720"), "{error}");
        }
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", ".hidden", "a/b", "../a", "a b", "é", "a\n", &"a".repeat(65)] {
            let error = Folder::open(directory.path(), name).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidConfig, "{name:?}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing was made");
    }

    #[test]
    fn the_room_on_the_disk_is_told_in_thousandths() {
        let (_directory, folder) = folder();
        assert!(folder.free_permille().unwrap() <= 1_000);
    }

    #[test]
    fn b21_one_folder_has_one_holder() {
        let (directory, folder) = folder();
        let audit = directory.path().join("audit");
        assert_eq!(Folder::open(&audit, "a").unwrap_err().reason(), Reason::Locked);
        assert!(Folder::open(&audit, "b").is_ok());
        drop(folder);
        assert!(Folder::open(&audit, "a").is_ok());
    }

    #[test]
    fn a_link_is_not_followed() {
        let (directory, folder) = folder();
        let elsewhere = directory.path().join("elsewhere");
        fs::write(&elsewhere, "").unwrap();
        symlink(&elsewhere, folder.path().join(file_name(1))).unwrap();
        assert!(folder.create(1).is_err());
        assert!(LineReader::open(&folder.path().join(file_name(1))).is_err());
        symlink(folder.path(), directory.path().join("audit/b")).unwrap();
        assert!(Folder::open(&directory.path().join("audit"), "b").is_err());
    }

    #[test]
    fn a_creation_is_repeated_only_over_an_empty_file() {
        let (_directory, folder) = folder();
        folder.create(1).unwrap();
        folder.create(1).unwrap().append(b"x\n", true).unwrap();
        assert_eq!(folder.create(1).unwrap_err().reason(), Reason::AuditUnavailable);
    }

    #[test]
    fn what_was_done_to_the_file_is_named() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", true).unwrap();
        segment.append(b"two\n", false).unwrap();
        assert_eq!(segment.problem().unwrap(), None);
        let path = segment.path().to_owned();
        fs::write(&path, "one\n").unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was cut from 8 to 4 bytes");
        fs::write(&path, "one\ntwo\nthree\n").unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it grew from 8 to 14 bytes");
        fs::rename(&path, path.with_extension("old")).unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was deleted or moved away");
        fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was replaced by another file");
        fs::remove_dir_all(folder.path()).unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was deleted or moved away");
    }

    #[test]
    fn after_a_failed_sync_only_what_was_acknowledged_is_written_again() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"durable\n", true).unwrap();
        segment.append(b"relaxed\n", false).unwrap();
        // As a failed sync leaves it: the page of the relaxed record is lost, part of the failed batch is there.
        fs::write(segment.path(), b"durable\n\0\0\0\0\0\0\0\0failed ba").unwrap();
        segment.damaged = true;
        assert_eq!(segment.problem().unwrap(), None, "a damaged file has any length behind what is synced");
        segment.mend().unwrap();
        assert_eq!(content(&segment), b"durable\nrelaxed\n");
        assert!(segment.unsynced.is_empty());
        segment.append(b"next\n", true).unwrap();
        assert_eq!(content(&segment), b"durable\nrelaxed\nnext\n");
    }

    #[test]
    fn a_damaged_file_that_lost_synced_bytes_is_not_mended() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"durable\n", true).unwrap();
        segment.damaged = true;
        fs::write(segment.path(), b"dur").unwrap();
        assert!(segment.mend().is_err());
        assert!(segment.problem().unwrap().is_some());
    }

    #[test]
    fn a_failed_write_leaves_nothing_and_keeps_what_was_acknowledged() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", false).unwrap();
        // A handle that can't write stands in for a disk that can't.
        let unwritable = File::open(segment.path()).unwrap();
        let good = std::mem::replace(&mut segment.file, unwritable);
        assert!(segment.append(b"two\n", true).is_err());
        assert!(segment.damaged);
        segment.file = good;
        segment.mend().unwrap();
        assert_eq!(content(&segment), b"one\n");
    }

    #[test]
    fn listing_sorts_and_sees_strangers() {
        let (_directory, folder) = folder();
        let (ten, two) = (file_name(10), file_name(2));
        for name in [&*ten, &*two, "1.jsonl", "x.jsonl", "notes.txt", "99999999999999999999.jsonl"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let listing = list(folder.path()).unwrap();
        assert_eq!(listing.segments, [2, 10]);
        assert_eq!(listing.strangers, ["1.jsonl", "99999999999999999999.jsonl", "x.jsonl"]);
    }

    #[test]
    fn lines_are_bounded() {
        let (_directory, folder) = folder();
        let path = folder.path().join("lines");
        let longest = vec![b'x'; MAX_LINE];
        let mut text = b"a\n\n".to_vec();
        for line in [longest.clone(), vec![b'y'; MAX_LINE + 1], vec![b'z'; 3 * MAX_LINE], b"b".to_vec()] {
            text.extend_from_slice(&line);
            text.push(b'\n');
        }
        text.extend_from_slice(b"torn");
        fs::write(&path, &text).unwrap();
        let mut lines = LineReader::open(&path).unwrap();
        for expected in [
            Chunk::Line(b"a"),
            Chunk::Line(b""),
            Chunk::Line(&longest),
            Chunk::TooLong,
            Chunk::TooLong,
            Chunk::Line(b"b"),
            Chunk::Torn(4),
        ] {
            assert!(lines.read().unwrap() == Some(expected));
        }
        assert_eq!(lines.read().unwrap(), None);
    }
}
