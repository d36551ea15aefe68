//! An instance's folder, held by one writer.
//!
//! ```text
//!   lock                                  held while a log is open
//!   00000000000000000001.jsonl            segments, by their first record
//!   00000000000000004711.jsonl
//!   next.prepared                         zeros that will be the next one; nothing at rest
//!   00000000000000000001.torn-81920       what a start cut off that segment behind byte 81,920, where it was more than
//!                                         one unfinished line
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::iter;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{OFlags, RenameFlags, StatVfs};

use super::super::AuditError;
use super::super::chain::{Frame, Head};
use super::read::{LINE_LIMIT, content_end, open_to_read, part};
use super::{
    Chunk, Identity, LineReader, Segment, file_name, is_instance, list, torn, unavailable, unreadable, wide,
    writable,
};

const LOCK: &str = "lock";
/// The name of a segment that is being prepared.
const NEXT: &str = "next.prepared";
/// How many stretches that were torn off one place are kept.
const MOST_KEPT: usize = 1_000;

/// An instance's folder, held by one writer.
#[derive(Debug)]
pub(in crate::audit) struct Folder {
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
    pub(in crate::audit) fn open(directory: &Path, instance: &str) -> Result<Self, AuditError> {
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

    pub(in crate::audit) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes and locks the folder again where its path no longer leads to it.
    pub(in crate::audit) fn refresh(&mut self) -> Result<(), AuditError> {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| Identity::of(&metadata) == self.identity) {
            return Ok(());
        }
        *self = Self::open(&self.directory, &self.instance)?;
        Ok(())
    }

    /// A new, empty segment whose name is on the disk.
    pub(in crate::audit) fn create(&self, first: u64) -> Result<Segment, AuditError> {
        let path = self.path.join(file_name(first));
        let file = match writable().create_new(true).mode(0o600).open(&path) {
            // An attempt that failed behind the creation left it: the folder is locked, so no one else did.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                writable().open(&path).and_then(|file| {
                    if content_end(&file, 0)? > 0 {
                        return Err(error);
                    }
                    file.set_len(0)?;
                    Ok(file)
                })
            }
            other => other,
        };
        let segment = file.and_then(|file| {
            self.handle.sync_all()?;
            Segment::new(path.clone(), file, 0)
        });
        segment.map_err(|error| unavailable(&path, &error))
    }

    /// A new, empty file for a segment to come, in place of what is left of an earlier one.
    pub(super) fn create_next(&self) -> io::Result<File> {
        self.discard_next();
        writable().create_new(true).mode(0o600).open(self.path.join(NEXT))
    }

    /// Makes the file that was [created](Self::create_next) for it, and holds `bytes` zeros on the disk by now, the
    /// segment that begins with `first`. Its name is then on the disk.
    pub(in crate::audit) fn adopt(&self, file: File, bytes: u64, first: u64) -> io::Result<Segment> {
        let adopted = self.rename_next(&file, bytes, first).and_then(|path| {
            let adopted = Segment::prepared(path, file, bytes)?;
            if let Err(error) = self.handle.sync_all() {
                // As an attempt to create an empty one would leave it.
                let _ = adopted.file.set_len(0);
                return Err(error);
            }
            Ok(adopted)
        });
        if adopted.is_err() {
            self.discard_next();
        }
        adopted
    }

    fn rename_next(&self, file: &File, bytes: u64, first: u64) -> io::Result<PathBuf> {
        let found = fs::symlink_metadata(self.path.join(NEXT))?;
        if Identity::of(&found) != Identity::of(&file.metadata()?) || found.len() != bytes {
            return Err(io::Error::other("it is not the file that was prepared"));
        }
        let name = file_name(first);
        rustix::fs::renameat_with(&self.handle, NEXT, &self.handle, &name, RenameFlags::NOREPLACE)?;
        Ok(self.path.join(name))
    }

    /// Removes what was prepared and is not used. Where that fails, the next start does it, or nobody minds.
    pub(super) fn discard_next(&self) {
        let _ = fs::remove_file(self.path.join(NEXT));
    }

    /// The segment that begins with `first`, cut to `length` bytes and synced: what an earlier process wrote may
    /// never have reached the disk. What it had set aside behind the file's end is given back, and so are zeros that it
    /// wrote ahead. What else is cut off is kept in a file beside it, where `keep_torn` says so.
    pub(in crate::audit) fn reopen(
        &self,
        first: u64,
        length: u64,
        keep_torn: bool,
    ) -> Result<Segment, AuditError> {
        if keep_torn {
            self.keep_torn(first, length)?;
        }
        self.trim_before(first);
        let path = self.path.join(file_name(first));
        let segment = writable().open(&path).and_then(|file| {
            file.set_len(length)?;
            file.sync_all()?;
            Segment::new(path.clone(), file, length)
        });
        segment.map_err(|error| unavailable(&path, &error))
    }

    /// Brings what a segment holds behind `offset` to the disk, in a file of its own.
    fn keep_torn(&self, first: u64, offset: u64) -> Result<(), AuditError> {
        let segment = self.path.join(file_name(first));
        let torn = torn(&segment, offset).map_err(|error| unreadable(&segment, &error))?;
        let torn = torn.unwrap_or_default();
        let name = format!("{first:020}.torn-{offset}");
        // What came behind the last repair may be torn off the same place.
        let others = (2..=MOST_KEPT).map(|number| format!("{name}.{number}"));
        for name in iter::once(name.clone()).chain(others) {
            let path = self.path.join(name);
            let kept = keep(&path, &torn).and_then(|kept| self.handle.sync_all().map(|()| kept));
            if kept.map_err(|error| unavailable(&path, &error))? {
                return Ok(());
            }
        }
        let problem = format!("it holds {MOST_KEPT} files {name}.*; keep them elsewhere as evidence");
        Err(AuditError::Unusable { path: self.path.display().to_string(), problem })
    }

    /// Cuts the zeros off the segment before `last`, where a crash came before that was done. Readers pass over them, so
    /// that it does not matter where it fails.
    fn trim_before(&self, last: u64) {
        let former =
            list(&self.path).map(|listing| listing.segments.into_iter().rfind(|first| *first < last));
        let Ok(Some(former)) = former else { return };
        let _ = writable().open(self.path.join(file_name(former))).and_then(|file| {
            let end = content_end(&file, 0)?;
            let is_whole = end > 0 && part(&file, end - 1, end)? == b"\n";
            if !is_whole || end == file.metadata()?.len() {
                return Ok(());
            }
            file.set_len(end)?;
            file.sync_data()
        });
    }

    /// Takes back a segment that was [created](Self::create), or was about to be, and holds nothing.
    pub(in crate::audit) fn discard(&self, first: u64) -> io::Result<()> {
        match fs::symlink_metadata(self.path.join(file_name(first))) {
            Ok(found) if found.len() == 0 => self.remove(first),
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.handle.sync_all(),
            Err(error) => Err(error),
        }
    }

    /// Removes a segment.
    pub(in crate::audit) fn remove(&self, first: u64) -> io::Result<()> {
        fs::remove_file(self.path.join(file_name(first)))?;
        self.handle.sync_all()
    }

    /// How much of the disk is free for this process, in thousandths of what it may use; `None` where the kernel does
    /// not say.
    pub(in crate::audit) fn free_permille(&self) -> Option<u32> {
        free_permille(&rustix::fs::fstatvfs(&self.handle).ok()?)
    }

    /// When the newest record of a segment was written; `None` where its last line is damaged.
    pub(in crate::audit) fn newest(&self, first: u64) -> io::Result<Option<Timestamp>> {
        let file = open_to_read(&self.path.join(file_name(first)))?;
        let end = content_end(&file, 0)?;
        let tail = part(&file, end.saturating_sub(LINE_LIMIT), end)?;
        let line = tail.strip_suffix(b"\n").and_then(|tail| tail.rsplit(|byte| *byte == b'\n').next());
        Ok(line.and_then(Frame::parse).and_then(|frame| frame.timestamp()))
    }

    /// Where the chain stood before a segment's first record; `None` where that line is damaged.
    pub(in crate::audit) fn before(&self, first: u64) -> Result<Option<Head>, AuditError> {
        let mut lines = LineReader::open(&self.path.join(file_name(first)))?;
        Ok(match lines.read()? {
            Some(Chunk::Line(line)) => Frame::parse(line)
                .filter(|frame| frame.is_authentic() && frame.seq == first)
                .map(|frame| Head { seq: first - 1, hash: frame.prev }),
            _ => None,
        })
    }
}

/// What [`Folder::free_permille`] says.
pub(super) fn free_permille(disk: &StatVfs) -> Option<u32> {
    let used = disk.f_blocks.checked_sub(disk.f_bfree)?;
    // What is kept back for root is neither used nor free.
    let all = used.checked_add(disk.f_bavail).filter(|all| *all > 0)?;
    u32::try_from(u128::from(disk.f_bavail) * 1_000 / u128::from(all)).ok()
}

/// Writes and syncs a file; `false` where there is another one of that name.
fn keep(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let file = match writable().create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(holds(path, bytes)),
        opened => opened?,
    };
    let written = file.write_all_at(bytes, 0).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written.map(|()| true)
}

/// Whether an earlier attempt has brought the bytes to the disk.
fn holds(path: &Path, bytes: &[u8]) -> bool {
    let length = wide(bytes.len());
    open_to_read(path).is_ok_and(|file| {
        file.metadata().is_ok_and(|metadata| metadata.len() == length)
            && part(&file, 0, length).is_ok_and(|found| found == bytes)
            && file.sync_all().is_ok()
    })
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

#[cfg(test)]
mod tests {
    use super::super::tests::{content, folder};
    use super::*;
    use crate::error::{Reason, Reasoned};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    /// A file of zeros that is ready to be a segment.
    fn next(folder: &Folder, bytes: usize) -> File {
        let file = folder.create_next().unwrap();
        file.write_all_at(&vec![0; bytes], 0).unwrap();
        file
    }

    #[test]
    fn folders_and_files_are_private() {
        let (directory, folder) = folder();
        let segment = folder.create(1).unwrap();
        assert_eq!(segment.name(), "00000000000000000001.jsonl");
        assert_eq!(mode(&directory.path().join("audit")), 0o700);
        assert_eq!(mode(folder.path()), 0o700);
        assert_eq!(mode(segment.path()), 0o600);
        drop(next(&folder, 10));
        assert_eq!(mode(&folder.path().join(NEXT)), 0o600);
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
    fn a_creation_is_repeated_only_over_a_file_that_holds_nothing() {
        let (_directory, folder) = folder();
        folder.create(1).unwrap();
        fs::write(folder.path().join(file_name(1)), [0_u8; 100]).unwrap();
        let mut segment = folder.create(1).unwrap();
        assert_eq!(content(&segment), b"");
        segment.append(b"x\n", true).unwrap();
        assert_eq!(folder.create(1).unwrap_err().reason(), Reason::AuditUnavailable);
        assert_eq!(content(&segment), b"x\n");
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
    fn what_was_prepared_becomes_a_segment() {
        let (_directory, folder) = folder();
        let segment = folder.adopt(next(&folder, 100), 100, 7).unwrap();
        assert_eq!(segment.name(), file_name(7));
        assert_eq!(content(&segment), [0_u8; 100]);
        assert!(segment.is_prepared());
        assert!(!folder.path().join(NEXT).exists());
    }

    #[test]
    fn what_is_not_as_it_was_prepared_does_not_become_a_segment() {
        let (directory, folder) = folder();
        let path = folder.path().join(NEXT);
        let elsewhere = directory.path().join("elsewhere");
        let changes: [&dyn Fn(); 4] = [
            &|| fs::remove_file(&path).unwrap(),
            &|| OpenOptions::new().write(true).open(&path).unwrap().set_len(99).unwrap(),
            &|| {
                fs::copy(&path, &elsewhere).unwrap();
                fs::rename(&elsewhere, &path).unwrap();
            },
            &|| {
                fs::rename(&path, &elsewhere).unwrap();
                symlink(&elsewhere, &path).unwrap();
            },
        ];
        for change in changes {
            let file = next(&folder, 100);
            change();
            assert!(folder.adopt(file, 100, 7).is_err());
            assert!(list(folder.path()).unwrap().segments.is_empty());
            assert!(fs::symlink_metadata(&path).is_err(), "and it is out of the way");
        }
        assert_eq!(fs::metadata(&elsewhere).unwrap().len(), 100, "where the link led is as it was");

        let mut held = folder.create(7).unwrap();
        held.append(b"x\n", true).unwrap();
        assert!(folder.adopt(next(&folder, 100), 100, 7).is_err());
        assert_eq!(content(&held), b"x\n", "and nothing is replaced by it");
    }

    #[test]
    fn a_next_one_is_begun_anew_over_what_is_left_of_another() {
        let (directory, folder) = folder();
        let path = folder.path().join(NEXT);
        let elsewhere = directory.path().join("elsewhere");
        fs::write(&elsewhere, "mine").unwrap();
        fs::write(&path, "left").unwrap();
        assert_eq!(folder.create_next().unwrap().metadata().unwrap().len(), 0);
        fs::remove_file(&path).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert_eq!(folder.create_next().unwrap().metadata().unwrap().len(), 0);
        assert_eq!(fs::read(&elsewhere).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(folder.create_next().is_err());
        assert!(path.is_dir());
    }

    #[test]
    fn what_is_cut_off_is_kept_and_nothing_kept_is_written_over() {
        let (_directory, folder) = folder();
        let path = folder.path().join(file_name(1));
        let kept = |name: &str| fs::read(folder.path().join(name)).unwrap();
        fs::write(&path, b"one\ntw\0o\nthree\n\0\0\0").unwrap();
        let mut segment = folder.reopen(1, 4, true).unwrap();
        assert_eq!(content(&segment), b"one\n");
        assert_eq!(kept("00000000000000000001.torn-4"), b"tw\0o\nthree\n");
        assert_eq!(mode(&folder.path().join("00000000000000000001.torn-4")), 0o600);

        segment.append(b"f\0ur\nfive\n", true).unwrap();
        drop(folder.reopen(1, 4, true).unwrap());
        assert_eq!(kept("00000000000000000001.torn-4"), b"tw\0o\nthree\n");
        assert_eq!(kept("00000000000000000001.torn-4.2"), b"f\0ur\nfive\n");

        // A start that was killed before the cut begins again.
        fs::write(&path, b"one\nf\0ur\nfive\n\0").unwrap();
        drop(folder.reopen(1, 4, true).unwrap());
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.filter(|name| name.to_string_lossy().contains("torn")).count(), 2);
        assert_eq!(list(folder.path()).unwrap().segments, [1]);
        assert!(list(folder.path()).unwrap().strangers.is_empty());
    }

    #[test]
    fn a_start_trims_the_segment_before_the_last() {
        let (_directory, folder) = folder();
        let cases: [(u64, &[u8], &[u8]); 4] = [
            (1, b"one\n\0\0", b"one\n\0\0"),
            (2, b"two\n\0\0\0", b"two\n"),
            (4, b"fo\0", b"fo\0"),
            (6, b"six\n\0\0", b"six\n"),
        ];
        for (first, bytes, _) in cases {
            fs::write(folder.path().join(file_name(first)), bytes).unwrap();
        }
        for (last, length) in [(4, 3), (6, 4)] {
            drop(folder.reopen(last, length, false).unwrap());
        }
        for (first, _, expected) in cases {
            assert_eq!(fs::read(folder.path().join(file_name(first))).unwrap(), expected, "{first}");
        }
    }

    #[test]
    fn the_newest_record_is_found_before_the_zeros() {
        let (_directory, folder) = folder();
        let hash = "0".repeat(64);
        let line = format!(
            "{{\"hash\":\"{hash}\",\"seq\":1,\"prev\":\"{hash}\",\"time\":\"2026-01-02T03:04:05Z\",\"instance\":\"a\",\"kind\":\"shutdown\"}}\n"
        );
        let newest = |bytes: &[u8]| {
            fs::write(folder.path().join(file_name(1)), bytes).unwrap();
            folder.newest(1).unwrap().map(|time| time.to_string())
        };
        let zeros = vec![0_u8; 3 << 20];
        assert_eq!(newest(line.as_bytes()).unwrap(), "2026-01-02T03:04:05Z");
        assert_eq!(newest(&[line.as_bytes(), &zeros[..]].concat()).unwrap(), "2026-01-02T03:04:05Z");
        assert_eq!(newest(&[line.as_bytes(), &b"torn"[..], &zeros[..]].concat()), None);
        assert_eq!(newest(&zeros), None);
    }
}
