//! Files: an instance's folder and its lock, the segment that is written to, and bounded reading.
//!
//! ```text
//!              0                    synced              synced + unsynced         room
//!   segment    ├────────────────────┼───────────────────┼ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ┤
//!              known to be on disk    written and           blocks without content, behind
//!                                     acknowledged, kept    the file's end, while space is
//!                                     in memory as well     set aside: see `reserve`
//! ```
//!
//! INVARIANT: between two calls the file ends where `unsynced` ends, or the segment is `damaged`. After a failed sync
//! the kernel may have dropped what it called written, so nothing behind `synced` is believed: the file is opened
//! anew, cut back to `synced`, and what was acknowledged is written again from memory. To cut a file takes away the blocks
//! behind its end as well, whatever its length is to be.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use ring::digest;
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Resource, getrlimit};

use super::AuditError;
use super::chain::{ChainHash, Frame, Head, MAX_LINE};

const SUFFIX: &str = ".jsonl";
const LOCK: &str = "lock";
const READ_AT_ONCE: usize = 64 << 10;
/// How many bytes more than needed are set aside at once.
const STRIDE: u64 = 64 << 10;

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

/// Why no space was set aside.
pub(super) fn not_set_aside(path: &Path, cause: &io::Error) -> AuditError {
    if Errno::from_io_error(cause) != Some(Errno::OPNOTSUPP) {
        return unavailable(path, cause);
    }
    let problem = "its file system can't set space aside, which a rotation needs; keep the audit log on one that can (ext4, XFS, Btrfs, tmpfs)";
    AuditError::Unusable { path: path.display().to_string(), problem: problem.to_owned() }
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
    /// never have reached the disk. What it had set aside behind the file's end is given back.
    pub(super) fn reopen(&self, first: u64, length: u64) -> Result<Segment, AuditError> {
        let path = self.path.join(file_name(first));
        let segment = writable().open(&path).and_then(|file| {
            file.set_len(length)?;
            file.sync_all()?;
            Segment::new(path.clone(), file, length)
        });
        segment.map_err(|error| unavailable(&path, &error))
    }

    /// Takes back a segment that was [created](Self::create), or was about to be, and holds nothing.
    pub(super) fn discard(&self, first: u64) -> io::Result<()> {
        match fs::symlink_metadata(self.path.join(file_name(first))) {
            Ok(found) if found.len() == 0 => self.remove(first),
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.handle.sync_all(),
            Err(error) => Err(error),
        }
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
    /// Up to where the file has blocks of its own, as far as they were set aside.
    room: u64,
}

impl Segment {
    fn new(path: PathBuf, file: File, synced: u64) -> io::Result<Self> {
        let identity = Identity::of(&file.metadata()?);
        Ok(Self { path, file, identity, synced, unsynced: Vec::new(), damaged: false, room: 0 })
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
            if let Ok(room) = cut(&self.file, end, self.room) {
                self.room = room;
                if self.file.sync_data().is_ok() {
                    self.settle(end);
                }
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
        self.room = cut(&file, self.synced, self.room)?;
        file.write_all_at(&self.unsynced, self.synced)?;
        file.sync_data()?;
        self.file = file;
        self.settle(self.len());
        Ok(())
    }

    /// Sees to it that the next `bytes` behind what was acknowledged have blocks that nobody else can take. The file does
    /// not grow by it. On an error nothing of what was set aside before is lost.
    pub(super) fn secure(&mut self, bytes: u64) -> io::Result<()> {
        if self.len().saturating_add(bytes) <= self.room {
            return Ok(());
        }
        // More than is asked for, where the disk has it: not every batch then asks for a little.
        let ample = bytes.saturating_add(STRIDE);
        let secured = self.set_aside(ample).or_else(|_| self.set_aside(bytes));
        // A part of it may be there. Where something was set aside before, that part will come in useful.
        if secured.is_err() && !self.is_roomy() {
            let _ = self.trim();
        }
        secured
    }

    fn set_aside(&mut self, bytes: u64) -> io::Result<()> {
        let end = self.len();
        allocate(&self.file, end, bytes)?;
        self.room = end.saturating_add(bytes);
        Ok(())
    }

    /// Whether space is set aside behind the end.
    pub(super) fn is_roomy(&self) -> bool {
        self.room > self.len()
    }

    /// Gives back what is set aside behind the end.
    pub(super) fn trim(&mut self) -> io::Result<()> {
        self.room = 0;
        // Where someone changed the file, its end is evidence; where it is damaged, it is cut when it is mended.
        if self.damaged || self.problem()?.is_some() {
            return Ok(());
        }
        self.file.set_len(self.len())
    }

    fn settle(&mut self, length: u64) {
        self.synced = length;
        self.unsynced.clear();
        self.damaged = false;
    }
}

/// Cuts a file. What was set aside behind its end, up to `room`, goes with it and is set aside anew; gives how far that
/// reaches.
fn cut(file: &File, length: u64, room: u64) -> io::Result<u64> {
    file.set_len(length)?;
    let behind = room.saturating_sub(length);
    Ok(if allocate(file, length, behind).is_ok() { room } else { 0 })
}

/// Gives a file blocks for `bytes` from `offset` on, without changing its length.
fn allocate(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // The kernel looks at this bound only when something is written.
    let longest = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
    if offset.saturating_add(bytes) > longest {
        return Err(Errno::FBIG.into());
    }
    Ok(retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, bytes))?)
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
pub(super) fn wide(count: usize) -> u64 {
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

    fn allocated(segment: &Segment) -> u64 {
        fs::metadata(segment.path()).unwrap().blocks() * 512
    }

    #[test]
    fn what_is_set_aside_is_not_seen_and_goes_back() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", true).unwrap();
        let before = allocated(&segment);
        segment.secure(200_000).unwrap();
        assert!(segment.is_roomy());
        assert!(allocated(&segment) >= 200_000);
        assert_eq!(segment.problem().unwrap(), None, "it did not grow");
        segment.append(b"two\n", true).unwrap();
        assert_eq!(content(&segment), b"one\ntwo\n");
        let held = allocated(&segment);
        segment.secure(200_000).unwrap();
        assert_eq!(allocated(&segment), held, "there was more at hand");
        segment.trim().unwrap();
        assert!(!segment.is_roomy());
        assert_eq!(allocated(&segment), before);
        assert_eq!(content(&segment), b"one\ntwo\n");
        segment.append(b"three\n", true).unwrap();
        assert_eq!(content(&segment), b"one\ntwo\nthree\n");
    }

    #[test]
    fn what_is_set_aside_stays_over_a_failure() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", false).unwrap();
        segment.secure(200_000).unwrap();
        fs::write(segment.path(), b"one\nfailed ba").unwrap();
        segment.damaged = true;
        segment.mend().unwrap();
        assert_eq!(content(&segment), b"one\n");
        assert!(segment.is_roomy() && allocated(&segment) >= 200_000);
    }

    #[test]
    fn what_was_set_aside_before_a_crash_is_given_back() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", true).unwrap();
        segment.secure(200_000).unwrap();
        drop(segment);
        let segment = folder.reopen(1, 4).unwrap();
        assert!(!segment.is_roomy() && allocated(&segment) < 200_000);
        assert_eq!(content(&segment), b"one\n");
    }

    #[test]
    fn more_than_there_is_can_not_be_set_aside() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", true).unwrap();
        let before = allocated(&segment);
        for bytes in [u64::MAX, 1 << 62] {
            assert!(segment.secure(bytes).is_err());
            assert!(!segment.is_roomy());
            assert_eq!(allocated(&segment), before);
        }
        segment.secure(1).unwrap();
        assert!(segment.secure(u64::MAX).is_err());
        assert!(segment.is_roomy(), "what was there stays");
    }

    #[test]
    fn what_someone_wrote_behind_the_end_is_not_cut_off() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        segment.append(b"one\n", true).unwrap();
        segment.secure(1_000).unwrap();
        fs::write(segment.path(), b"one\nmore\n").unwrap();
        segment.trim().unwrap();
        assert_eq!(content(&segment), b"one\nmore\n");
    }

    #[test]
    fn only_an_empty_segment_is_taken_back() {
        let (_directory, folder) = folder();
        let mut segment = folder.create(1).unwrap();
        folder.discard(2).unwrap();
        segment.append(b"one\n", true).unwrap();
        assert!(folder.discard(1).is_err());
        folder.create(2).unwrap();
        folder.discard(2).unwrap();
        assert_eq!(list(folder.path()).unwrap().segments, [1]);
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
