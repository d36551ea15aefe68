//! Key files: opened without trust in what the path leads to, and created so that nobody else ever could read them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;
use zeroize::Zeroizing;

use crate::error::{Reason, Reasoned};

/// Why there is no key: where it was looked for, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {problem}")]
pub struct KeyError {
    origin: String,
    problem: KeyProblem,
}

/// What is wrong with a key, and the mend where nothing is known of what the key is for: whoever knows that something is
/// sealed or signed with it says so instead, see [`KeyError::origin`]. Nothing of the key itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyProblem {
    /// No such file.
    #[error("does not exist; correct the path, or create the key first")]
    Missing,
    /// The last part of the path is a symbolic link.
    #[error("is a symbolic link; name the file that it points to")]
    Symlink,
    /// Not a regular file.
    #[error("is {0}; a key is a regular file")]
    NotAFile(&'static str),
    /// Someone else could change the file.
    #[error("is owned by uid {owner}, but must be owned by uid {ours} or by root; run `chown {ours} {path}`")]
    Owner {
        /// The file's owner.
        owner: u32,
        /// This process's effective user.
        ours: u32,
        /// The file.
        path: String,
    },
    /// The file's permissions go beyond its owner's reading and writing.
    #[error("has mode {mode:04o}, but a key is for its owner alone; run `chmod 0600 {path}`")]
    Mode {
        /// The file's permission bits.
        mode: RawMode,
        /// The file.
        path: String,
    },
    /// The operating system refuses.
    #[error("can't be read: {0}")]
    Unreadable(String),
    /// Larger than any key.
    #[error("holds more than {0} bytes, which is no key; correct the path")]
    TooLarge(usize),
    /// Nothing in it.
    #[error("is empty; remove it and create the key anew")]
    Empty,
    /// Neither of the lengths of a root key.
    #[error("holds {0} bytes; a root key is 32 raw bytes or 64 hex digits")]
    Length(usize),
    /// As long as hex, but not hex.
    #[error("character {position} is not a hex digit; a root key is 32 raw bytes or 64 hex digits")]
    NotHex {
        /// 1-based.
        position: usize,
    },
    /// As long as a raw key, but text, of which 32 characters are far weaker than 32 random bytes.
    #[error("is 32 characters of text; a root key is 32 random bytes or 64 hex digits, not a passphrase")]
    Text,
    /// The same byte throughout, for instance all zeros.
    #[error("repeats one byte, so it is a placeholder and not a key; create a random one")]
    Placeholder,
    /// A systemd credential's name that leads out of the credentials directory.
    #[error("is not the name of a credential; give one file name without `/`")]
    CredentialName,
    /// A key is there already.
    #[error("exists already, and a key is never overwritten; choose another path or move the old key away")]
    Exists,
    /// The new file can't be made durable.
    #[error("can't be created: {0}")]
    Unwritable(String),
    /// The operating system gave no random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
    /// A defect: the cipher does not take a key of the right length.
    #[error("is refused by the cipher")]
    Cipher,
}

impl KeyError {
    pub(super) fn new(origin: impl Into<String>, problem: KeyProblem) -> Self {
        Self { origin: origin.into(), problem }
    }

    pub(super) fn of_file(path: &Path, problem: KeyProblem) -> Self {
        Self::new(format!("key file `{}`", shown(path)), problem)
    }

    /// Where the key was looked for, for example ``key file `/etc/claviger/root.key` ``.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// What is wrong.
    #[must_use]
    pub const fn problem(&self) -> &KeyProblem {
        &self.problem
    }
}

impl Reasoned for KeyError {
    fn reason(&self) -> Reason {
        match self.problem {
            KeyProblem::Random | KeyProblem::Cipher => Reason::Internal,
            _ => Reason::InvalidKey,
        }
    }
}

/// Reads a key file: a regular file, not reached through a symbolic link, owned by this process's user or by root,
/// with no permission beyond 0600, of at most `max_bytes` bytes.
///
/// # Errors
/// [`Reason::InvalidKey`], each fault with a message of its own.
pub fn read_key_file(path: &Path, max_bytes: usize) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    read(path, max_bytes, 0o600).map_err(|problem| KeyError::of_file(path, problem))
}

/// As [`read_key_file`], for what systemd puts into a credentials directory: mode 0400, or 0440 where an access
/// control list names the service's user, whose mask `stat` shows as the group's bits (`systemd.exec(5)`,
/// `LoadCredential=`).
pub(super) fn read_credential(path: &Path, max_bytes: usize) -> Result<Zeroizing<Vec<u8>>, KeyProblem> {
    read(path, max_bytes, 0o640)
}

/// Creates a key file with mode 0600. When this returns, file and name are on the disk; where it fails, there is
/// no file.
///
/// # Errors
/// [`Reason::InvalidKey`]: a file that exists is never overwritten, or the folder can't be written.
pub fn create_key_file(path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
    let refuse = |problem| KeyError::of_file(path, problem);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| {
        refuse(match error {
            Errno::EXIST => KeyProblem::Exists,
            error => KeyProblem::Unwritable(error.to_string()),
        })
    })?;
    fill(&File::from(file), path, bytes).map_err(|error| {
        // It is this call's own file, and half a key is worse than none. A failure to remove it adds nothing.
        let _ = std::fs::remove_file(path);
        refuse(KeyProblem::Unwritable(error.to_string()))
    })
}

fn read(path: &Path, max_bytes: usize, permitted: RawMode) -> Result<Zeroizing<Vec<u8>>, KeyProblem> {
    // Without O_NONBLOCK the open of a FIFO would wait for a writer; without O_NOCTTY that of a terminal would
    // adopt it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOENT => KeyProblem::Missing,
        Errno::LOOP => KeyProblem::Symlink,
        Errno::NXIO => KeyProblem::NotAFile("a socket or a device"),
        error => KeyProblem::Unreadable(error.to_string()),
    })?;
    let file = File::from(file);
    check(&file, path, permitted)?;
    let bytes = read_bounded(&file, max_bytes).map_err(|error| KeyProblem::Unreadable(error.to_string()))?;
    match bytes.len() {
        0 => Err(KeyProblem::Empty),
        length if length > max_bytes => Err(KeyProblem::TooLarge(max_bytes)),
        _ => Ok(bytes),
    }
}

/// Looks at the open file, not at the path, which may lead elsewhere a moment later.
fn check(file: &File, path: &Path, permitted: RawMode) -> Result<(), KeyProblem> {
    let stat = rustix::fs::fstat(file).map_err(|error| KeyProblem::Unreadable(error.to_string()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(KeyProblem::NotAFile("a directory")),
        FileType::Fifo => return Err(KeyProblem::NotAFile("a FIFO")),
        FileType::CharacterDevice | FileType::BlockDevice => return Err(KeyProblem::NotAFile("a device")),
        _ => return Err(KeyProblem::NotAFile("no regular file")),
    }
    let (owner, ours) = (stat.st_uid, rustix::process::geteuid().as_raw());
    if owner != ours && owner != 0 {
        return Err(KeyProblem::Owner { owner, ours, path: shown(path) });
    }
    let mode = stat.st_mode & 0o7777;
    if mode & !permitted != 0 {
        return Err(KeyProblem::Mode { mode, path: shown(path) });
    }
    Ok(())
}

/// At most `max_bytes` and one more, into a buffer that never grows: growing would leave copies behind.
fn read_bounded(mut file: &File, max_bytes: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0_u8; max_bytes.saturating_add(1)]);
    let mut filled = 0;
    while let Some(free) = bytes.get_mut(filled..).filter(|free| !free.is_empty()) {
        match file.read(free) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

fn fill(mut file: &File, path: &Path, bytes: &[u8]) -> io::Result<()> {
    // The mode given to open is cut by the process's umask, which may be 0777.
    rustix::fs::fchmod(file, Mode::RUSR | Mode::WUSR)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// A path that stays on one line.
fn shown(path: &Path) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    path.to_string_lossy().chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn file(&self, name: &str, content: &[u8], mode: u32) -> PathBuf {
            let path = self.path(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    fn problem(path: &Path) -> KeyProblem {
        let error = read_key_file(path, 64).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidKey);
        assert!(error.to_string().starts_with("key file `"), "{error}");
        assert_eq!(error.to_string(), format!("{}: {}", error.origin(), error.problem()));
        error.problem().clone()
    }

    #[test]
    fn what_is_created_is_read_back_and_private() {
        let folder = Folder::new();
        let path = folder.path("key");
        create_key_file(&path, b"content").unwrap();
        assert_eq!(read_key_file(&path, 7).unwrap().as_slice(), b"content");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn an_existing_file_is_never_overwritten() {
        let folder = Folder::new();
        let path = folder.file("key", b"old", 0o600);
        assert_eq!(*create_key_file(&path, b"new").unwrap_err().problem(), KeyProblem::Exists);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");

        let link = folder.path("link");
        symlink(folder.path("nowhere"), &link).unwrap();
        assert_eq!(*create_key_file(&link, b"new").unwrap_err().problem(), KeyProblem::Exists);
        assert!(!folder.path("nowhere").exists());
    }

    #[test]
    fn a_missing_folder_is_said() {
        let folder = Folder::new();
        let error = create_key_file(&folder.path("no/key"), b"new").unwrap_err();
        assert!(matches!(error.problem(), KeyProblem::Unwritable(_)), "{error}");
    }

    #[test]
    fn each_fault_of_the_file_is_its_own() {
        let folder = Folder::new();
        assert_eq!(problem(&folder.path("missing")), KeyProblem::Missing);
        assert_eq!(problem(folder.0.path()), KeyProblem::NotAFile("a directory"));
        assert_eq!(problem(Path::new("/dev/null")), KeyProblem::NotAFile("a device"));
        assert_eq!(problem(&folder.file("empty", b"", 0o600)), KeyProblem::Empty);
        assert_eq!(problem(&folder.file("large", &[7; 65], 0o600)), KeyProblem::TooLarge(64));
        assert_eq!(read_key_file(&folder.file("fits", &[7; 64], 0o600), 64).unwrap().len(), 64);

        let link = folder.path("link");
        symlink(folder.path("fits"), &link).unwrap();
        assert_eq!(problem(&link), KeyProblem::Symlink);
    }

    #[test]
    fn a_fifo_is_refused_without_waiting_for_a_writer() {
        let folder = Folder::new();
        let path = folder.path("fifo");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        assert_eq!(problem(&path), KeyProblem::NotAFile("a FIFO"));
    }

    #[test]
    fn any_permission_beyond_the_owners_is_refused_with_the_mend() {
        let folder = Folder::new();
        for mode in [0o644, 0o640, 0o604, 0o602, 0o700, 0o4600] {
            let path = folder.file(&format!("{mode:o}"), b"content", mode);
            let error = read_key_file(&path, 64).unwrap_err();
            let path = path.display();
            assert_eq!(
                error.to_string(),
                format!(
                    "key file `{path}`: has mode {mode:04o}, but a key is for its owner alone; run `chmod 0600 {path}`"
                )
            );
        }
        for mode in [0o600, 0o400] {
            assert!(read_key_file(&folder.file(&format!("{mode:o}"), b"content", mode), 64).is_ok());
        }
    }

    #[test]
    fn credentials_may_carry_the_mask_of_an_access_control_list() {
        let folder = Folder::new();
        for mode in [0o400, 0o440, 0o600] {
            assert!(read_credential(&folder.file(&format!("{mode:o}"), b"content", mode), 64).is_ok());
        }
        for mode in [0o444, 0o660] {
            let refused = read_credential(&folder.file(&format!("{mode:o}"), b"content", mode), 64);
            assert!(matches!(refused, Err(KeyProblem::Mode { .. })), "{mode:o}");
        }
    }

    /// Only root can give a file away, so that only root can see this.
    #[test]
    fn a_file_of_another_user_is_refused() {
        let folder = Folder::new();
        let path = folder.file("key", b"content", 0o600);
        if !rustix::process::geteuid().is_root()
            || std::os::unix::fs::chown(&path, Some(12_345), None).is_err()
        {
            return;
        }
        let expected = KeyProblem::Owner { owner: 12_345, ours: 0, path: path.display().to_string() };
        assert_eq!(problem(&path), expected);
    }

    #[test]
    fn a_path_stays_on_one_line() {
        let error = read_key_file(Path::new("/nowhere/a\nb"), 64).unwrap_err();
        assert_eq!(
            error.to_string(),
            r"key file `/nowhere/a\nb`: does not exist; correct the path, or create the key first"
        );
    }
}
