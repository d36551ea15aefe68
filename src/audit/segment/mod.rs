//! Files: an instance's folder and its lock, the segment that is written to, what is prepared for the next one, and
//! bounded reading.
//!
//! ```text
//!              0                    synced              synced + unsynced         room
//!   segment    ├────────────────────┼───────────────────┼ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ┤
//!              known to be on disk    written and           blocks without content, behind
//!                                     acknowledged, kept    the file's end, while space is
//!                                     in memory as well     set aside: see `reserve`
//!
//!              0                    synced              synced + unsynced         prepared
//!   prepared   ├────────────────────┼───────────────────┼0 0 0 0 0 0 0 0 0 0 0 0 0┤
//!   segment                                              zeros on the disk, which    the file's end
//!                                                        the next lines overwrite
//! ```
//!
//! To append makes the file longer, which the file system has to put down in its own journal with each sync; to
//! overwrite what is on the disk already does not, and costs half as much. Under load, segments are therefore
//! [prepared](prepare::Preparer) before they are needed. What is at rest has no zeros at its end: a segment is trimmed
//! when the next one is begun, and when the log is closed. A crash leaves them; [readers](LineReader) take them for the
//! end.
//!
//! INVARIANT: between two calls the file ends where `unsynced` or `prepared` ends, whichever is more, or the segment is
//! `damaged`; and what the log wrote behind `unsynced` are zeros. After a failed sync the kernel may have dropped what it
//! called written, so nothing behind `synced` is believed: the file is opened anew, cut back to `synced`, and what was
//! acknowledged is written again from memory. To cut a file takes away the blocks behind its end as well, whatever its
//! length is to be; zeros that were written ahead are not written again.

mod folder;
mod prepare;
mod read;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Resource, getrlimit};

use self::read::content_end;
use super::AuditError;

pub(super) use self::folder::Folder;
pub(super) use self::prepare::Preparer;
pub(super) use self::read::{Chunk, LineReader, MAX_TORN, sync, torn};

const SUFFIX: &str = ".jsonl";
/// How many bytes more than needed are set aside at once.
const STRIDE: u64 = 64 << 10;

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
    /// How many bytes it held when this process began to write to it.
    found: u64,
    synced: u64,
    unsynced: Vec<u8>,
    damaged: bool,
    /// Up to where the file has blocks of its own, as far as they are needed.
    room: u64,
    /// Up to where zeros were written ahead; 0 where none were.
    prepared: u64,
    /// Another opening of the file, from before anything was written to it: the kernel tells each opening of the errors of
    /// write-back that came after it, and of others only where nobody has seen them yet.
    other: Option<Arc<File>>,
}

impl Segment {
    fn new(path: PathBuf, file: File, synced: u64) -> io::Result<Self> {
        let identity = Identity::of(&file.metadata()?);
        let other = reopened(&path, identity).ok();
        let (unsynced, damaged) = (Vec::new(), false);
        Ok(Self {
            path,
            file,
            identity,
            found: synced,
            synced,
            unsynced,
            damaged,
            room: 0,
            prepared: 0,
            other,
        })
    }

    /// An empty one whose file holds `bytes` zeros, which are on the disk.
    fn prepared(path: PathBuf, file: File, bytes: u64) -> io::Result<Self> {
        Ok(Self { prepared: bytes, ..Self::new(path, file, 0)? })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The sequence that its name says.
    pub(super) fn first(&self) -> u64 {
        let name = self.path.file_stem().and_then(|stem| stem.to_str());
        name.and_then(|digits| digits.parse().ok()).unwrap_or(0)
    }

    /// How many bytes are written and not known to be on the disk.
    pub(super) const fn unsynced(&self) -> usize {
        self.unsynced.len()
    }

    /// The file, to be synced by somebody else; `None` where that can't be.
    pub(super) fn other(&self) -> Option<Arc<File>> {
        self.other.clone().filter(|_| !self.damaged)
    }

    /// Has whoever syncs it beside the writer fail: a pipe can't be synced.
    #[cfg(test)]
    pub(super) fn fail_beside(&mut self) {
        let (reader, _) = io::pipe().unwrap();
        self.other = Some(Arc::new(File::from(std::os::fd::OwnedFd::from(reader))));
    }

    /// So many bytes from the beginning are on the disk.
    pub(super) fn is_synced_to(&mut self, bytes: u64) {
        let more = usize::try_from(bytes.saturating_sub(self.synced)).unwrap_or(usize::MAX);
        if !self.damaged && more > 0 && more <= self.unsynced.len() {
            self.unsynced.drain(..more);
            self.synced = bytes;
        }
    }

    /// How many bytes were acknowledged.
    pub(super) fn len(&self) -> u64 {
        self.synced + wide(self.unsynced.len())
    }

    /// How many of them since this process began to write to it.
    pub(super) fn taken(&self) -> u64 {
        self.len().saturating_sub(self.found)
    }

    /// Whether the next lines overwrite zeros that are on the disk.
    pub(super) fn is_prepared(&self) -> bool {
        self.prepared > self.len()
    }

    /// Where the file ends, as long as it is not damaged.
    fn end(&self) -> u64 {
        self.len().max(self.prepared)
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
        let (size, expected) = (found.len(), self.end());
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
            self.spoil();
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
            self.spoil();
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

    /// Nothing behind what was acknowledged is as it was left. It goes on as a file that grows.
    fn spoil(&mut self) {
        self.damaged = true;
        self.prepared = 0;
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
        self.other = reopened(&self.path, self.identity).ok();
        self.settle(self.len());
        Ok(())
    }

    /// Sees to it that the next `bytes` behind what was acknowledged have blocks that nobody else can take. The file does
    /// not grow by it. On an error nothing of what was set aside before is lost.
    pub(super) fn secure(&mut self, bytes: u64) -> io::Result<()> {
        let needed = self.len().saturating_add(bytes);
        if needed <= self.room {
            return Ok(());
        }
        if needed <= self.prepared {
            // Where zeros were written are blocks. Should they have to go, as many are to be set aside.
            self.room = needed;
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

    /// Whether space is set aside behind what was acknowledged.
    pub(super) fn is_roomy(&self) -> bool {
        self.room > self.len()
    }

    /// Gives back what is set aside behind the file's end.
    pub(super) fn trim(&mut self) -> io::Result<()> {
        self.room = 0;
        // Where someone changed the file, its end is evidence; where it is damaged, it is cut when it is mended.
        if self.damaged || self.problem()?.is_some() {
            return Ok(());
        }
        self.file.set_len(self.end())
    }

    /// Takes back, in a segment that nothing was written to, all that was written ahead or set aside.
    pub(super) fn empty(&mut self) -> io::Result<()> {
        (self.room, self.prepared) = (0, 0);
        self.file.set_len(self.len())
    }

    /// Leaves the file as its lines and nothing else, on the disk: no zeros, nothing set aside. What someone else wrote
    /// among the zeros is evidence, and stays.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if !self.is_prepared() && !self.is_roomy() {
            return Ok(());
        }
        if self.damaged || self.problem()?.is_some() {
            return Ok(());
        }
        if content_end(&self.file, self.len())? > self.len() {
            let segment = self.path.display();
            tracing::error!(%segment, "audit log: someone wrote into the segment, behind its last record");
            return Ok(());
        }
        self.empty()?;
        self.file.sync_data()
    }

    fn settle(&mut self, length: u64) {
        self.synced = length;
        self.unsynced.clear();
        self.damaged = false;
    }
}

fn reopened(path: &Path, identity: Identity) -> io::Result<Arc<File>> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)?;
    match Identity::of(&file.metadata()?) == identity {
        true => Ok(Arc::new(file)),
        false => Err(io::Error::other("the file is not the one that was written")),
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

/// Has this thread give way to those that serve. On Linux a priority is a thread's own (`setpriority(2)`, "C library/kernel
/// differences"). Where it can't be lowered, it works as it is.
pub(super) fn give_way(nice: i32) {
    let _ = rustix::process::setpriority_process(None, nice);
}

/// A number of bytes in memory as one of bytes in a file.
pub(super) fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn folder() -> (tempfile::TempDir, Folder) {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(&directory.path().join("audit"), "a").unwrap();
        (directory, folder)
    }

    pub(super) fn content(segment: &Segment) -> Vec<u8> {
        fs::read(segment.path()).unwrap()
    }

    /// A segment whose file holds `bytes` zeros.
    pub(super) fn prepared(folder: &Folder, first: u64, bytes: u64) -> Segment {
        let segment = folder.create(first).unwrap();
        segment.file.write_all_at(&vec![0; usize::try_from(bytes).unwrap()], 0).unwrap();
        Segment::prepared(segment.path.clone(), segment.file, bytes).unwrap()
    }

    fn allocated(segment: &Segment) -> u64 {
        fs::metadata(segment.path()).unwrap().blocks() * 512
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
        let segment = folder.reopen(1, 4, false).unwrap();
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
    fn listing_sorts_and_sees_strangers() {
        let (_directory, folder) = folder();
        let (ten, two) = (file_name(10), file_name(2));
        fs::create_dir(folder.path().join("next.prepared")).unwrap();
        fs::write(folder.path().join("00000000000000000002.torn-10"), "").unwrap();
        for name in [&*ten, &*two, "1.jsonl", "x.jsonl", "notes.txt", "99999999999999999999.jsonl"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let listing = list(folder.path()).unwrap();
        assert_eq!(listing.segments, [2, 10]);
        assert_eq!(listing.strangers, ["1.jsonl", "99999999999999999999.jsonl", "x.jsonl"]);
    }

    #[test]
    fn lines_overwrite_the_zeros_and_then_the_file_grows() {
        let (_directory, folder) = folder();
        let mut segment = prepared(&folder, 1, 10);
        assert!(segment.is_prepared());
        assert_eq!((segment.len(), segment.taken()), (0, 0));
        segment.append(b"one\n", true).unwrap();
        assert_eq!(content(&segment), b"one\n\0\0\0\0\0\0");
        segment.append(b"two\n", false).unwrap();
        assert_eq!(content(&segment), b"one\ntwo\n\0\0");
        assert!(segment.is_prepared());
        assert_eq!(segment.problem().unwrap(), None);
        segment.append(b"three\n", true).unwrap();
        assert_eq!(content(&segment), b"one\ntwo\nthree\n");
        assert!(!segment.is_prepared());
        assert_eq!((segment.len(), segment.taken()), (14, 14));
        assert_eq!(segment.problem().unwrap(), None);
        segment.finish().unwrap();
        segment.append(b"four\n", true).unwrap();
        assert_eq!(content(&segment), b"one\ntwo\nthree\nfour\n");
    }

    #[test]
    fn what_was_done_to_a_prepared_file_is_named() {
        let (_directory, folder) = folder();
        let mut segment = prepared(&folder, 1, 10);
        segment.append(b"one\n", true).unwrap();
        let file = writable().open(segment.path()).unwrap();
        file.set_len(9).unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was cut from 10 to 9 bytes");
        file.set_len(12).unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it grew from 10 to 12 bytes");
        file.set_len(10).unwrap();
        assert_eq!(segment.problem().unwrap(), None);
        fs::rename(segment.path(), segment.path().with_extension("old")).unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was deleted or moved away");
        fs::write(segment.path(), b"one\n\0\0\0\0\0\0").unwrap();
        assert_eq!(segment.problem().unwrap().unwrap(), "it was replaced by another file");
    }

    #[test]
    fn after_an_error_a_prepared_segment_is_one_that_grows() {
        let (_directory, folder) = folder();
        let mut segment = prepared(&folder, 1, 100);
        segment.append(b"durable\n", true).unwrap();
        segment.append(b"relaxed\n", false).unwrap();
        let failed = [&b"durable\n\0\0\0\0\0\0\0\0failed ba"[..], &[0; 75][..]].concat();
        fs::write(segment.path(), failed).unwrap();
        segment.spoil();
        assert_eq!(segment.problem().unwrap(), None);
        segment.mend().unwrap();
        assert_eq!(content(&segment), b"durable\nrelaxed\n");
        assert!(!segment.is_prepared());
        segment.append(b"next\n", true).unwrap();
        assert_eq!(content(&segment), b"durable\nrelaxed\nnext\n");
        assert_eq!(segment.problem().unwrap(), None);

        let mut segment = prepared(&folder, 2, 100);
        segment.append(b"one\n", false).unwrap();
        let unwritable = File::open(segment.path()).unwrap();
        let good = std::mem::replace(&mut segment.file, unwritable);
        assert!(segment.append(b"two\n", true).is_err());
        segment.file = good;
        segment.mend().unwrap();
        assert_eq!(content(&segment), b"one\n");
    }

    #[test]
    fn zeros_are_room_and_what_was_secured_there_is_set_aside_when_they_go() {
        let (_directory, folder) = folder();
        let mut segment = prepared(&folder, 1, 200_000);
        segment.append(b"one\n", true).unwrap();
        let held = allocated(&segment);
        segment.secure(100_000).unwrap();
        assert!(segment.is_roomy());
        assert_eq!(allocated(&segment), held, "it was there");
        segment.trim().unwrap();
        assert!(!segment.is_roomy() && segment.is_prepared());
        assert_eq!(segment.problem().unwrap(), None, "the zeros stay");

        segment.secure(300_000).unwrap();
        assert!(allocated(&segment) >= 300_000);
        segment.trim().unwrap();
        assert_eq!(segment.problem().unwrap(), None);
        assert!(allocated(&segment) < 300_000);

        segment.secure(100_000).unwrap();
        segment.spoil();
        segment.mend().unwrap();
        assert_eq!(content(&segment), b"one\n");
        assert!(segment.is_roomy() && allocated(&segment) >= 100_000);
        assert!(allocated(&segment) < 200_000);
    }

    #[test]
    fn a_finished_segment_is_its_lines_and_nothing_else() {
        let (_directory, folder) = folder();
        let mut segment = prepared(&folder, 1, 200_000);
        segment.append(b"one\n", true).unwrap();
        segment.append(b"two\n", false).unwrap();
        segment.secure(300_000).unwrap();
        segment.finish().unwrap();
        assert_eq!(content(&segment), b"one\ntwo\n");
        assert!(!segment.is_prepared() && !segment.is_roomy() && allocated(&segment) < 100_000);
        segment.append(b"three\n", true).unwrap();
        assert_eq!(content(&segment), b"one\ntwo\nthree\n");

        let mut empty = prepared(&folder, 20, 100);
        empty.empty().unwrap();
        folder.discard(20).unwrap();
    }

    #[test]
    fn what_someone_wrote_among_the_zeros_is_not_cut_off() {
        let (_directory, folder) = folder();
        let mut segment = prepared(&folder, 1, 1_000);
        segment.append(b"one\n", true).unwrap();
        writable().open(segment.path()).unwrap().write_all_at(b"x", 900).unwrap();
        let before = content(&segment);
        segment.finish().unwrap();
        assert_eq!(content(&segment), before);
        writable().open(segment.path()).unwrap().set_len(1_001).unwrap();
        segment.finish().unwrap();
        segment.trim().unwrap();
        assert_eq!(content(&segment).len(), 1_001, "nor what was put behind them");
    }
}
