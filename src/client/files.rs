//! Files that hold a secret of the caller's own: a token, the key of a client certificate.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::error::ClientError;
use crate::secret::SecretValue;

/// The largest token file. A token has 64 characters; another identity provider's may have more.
const LARGEST_TOKEN: usize = 16 * 1024;

/// Reads a token file: a regular file, the caller's or root's, for nobody else's eyes, of at most 16 KiB. A link is
/// followed, as orchestrators mount tokens behind one; what it leads to is what is checked, on the open file. A newline
/// at its end is no part of the token.
///
/// A group may read it where it is root's and the caller is not root: that is how Kubernetes mounts a secret for a pod
/// with an `fsGroup`.
///
/// # Errors
/// [`Reason::InvalidArgument`](crate::error::Reason::InvalidArgument), each fault with a message of its own; none
/// shows what is in the file.
pub fn read_token_file(path: &Path) -> Result<SecretValue, ClientError> {
    let refuse = |problem: String| ClientError::invalid(format!("{}: {problem}", path.display()));
    let bytes = read_private(path, "token file", LARGEST_TOKEN).map_err(refuse)?;
    let token = without_newline(&bytes);
    if token.is_empty() {
        return Err(refuse("the token file is empty; write the token into it".to_owned()));
    }
    let not_text = |_| refuse("the token file does not hold text".to_owned());
    let token = std::str::from_utf8(token).map_err(not_text)?;
    SecretValue::text(token.to_owned()).map_err(ClientError::from)
}

/// Reads a private file of at most `most` bytes, which its errors call `what`.
pub(super) fn read_private(path: &Path, what: &str, most: usize) -> Result<Zeroizing<Vec<u8>>, String> {
    // Not blocking: opening a pipe would wait for someone to write to it.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| format!("the {what} can't be opened: {error}"))?;
    let file = File::from(file);
    let found = file.metadata().map_err(|error| format!("the {what} can't be looked at: {error}"))?;
    if !found.is_file() {
        return Err(format!("a {what} is a regular file; this is a folder, a pipe or a device"));
    }
    check_owner(found.uid(), found.mode(), rustix::process::geteuid().as_raw(), what)?;
    // Of its full size from the start: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(most + 64));
    file.take(most as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("the {what} can't be read: {error}"))?;
    if bytes.len() > most {
        return Err(format!("the {what} is larger than {most} bytes; it holds one and nothing else"));
    }
    Ok(bytes)
}

fn check_owner(owner: u32, mode: u32, own: u32, what: &str) -> Result<(), String> {
    if owner != own && owner != 0 {
        return Err(format!("the {what} belongs to uid {owner}; it must be yours or root's"));
    }
    let others = if owner == own { 0o077 } else { 0o037 };
    if mode & others != 0 {
        return Err(format!("others may read the {what} (mode {:o}); chmod 600 it", mode & 0o777));
    }
    Ok(())
}

/// Without one newline at the end, of either kind.
fn without_newline(bytes: &[u8]) -> &[u8] {
    let Some(shorter) = bytes.strip_suffix(b"\n") else { return bytes };
    shorter.strip_suffix(b"\r").unwrap_or(shorter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;
    use std::os::unix::fs::PermissionsExt as _;

    fn write(path: &Path, content: &[u8], mode: u32) {
        std::fs::write(path, content).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_token_file_is_read_without_its_newline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for content in ["clv_1_x", "clv_1_x\n", "clv_1_x\r\n"] {
            write(&path, content.as_bytes(), 0o600);
            assert_eq!(read_token_file(&path).unwrap().expose_text(), Some("clv_1_x"), "{content:?}");
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read_token_file(&link).is_ok());
    }

    #[test]
    fn each_wrong_token_file_has_its_own_message() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let refused = |path: &Path| {
            let error = read_token_file(path).unwrap_err();
            assert_eq!(error.reason, Reason::InvalidArgument);
            assert!(error.message.starts_with(&format!("{}: ", path.display())), "{error}");
            error.message
        };
        assert!(refused(&path).contains("can't be opened"));
        assert!(refused(folder.path()).contains("regular file"));
        for (mode, shown) in [(0o644, "644"), (0o640, "640"), (0o620, "620")] {
            write(&path, b"canary", mode);
            assert!(refused(&path).contains(shown), "{mode:o}");
        }
        for (content, part) in [
            (&b""[..], "empty"),
            (b"\n", "empty"),
            (b"\xff\xfe", "text"),
            (&[b'a'; LARGEST_TOKEN + 1], "larger"),
        ] {
            write(&path, content, 0o600);
            assert!(refused(&path).contains(part), "{part}");
        }
        let pipe = folder.path().join("pipe");
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(refused(&pipe).contains("pipe"));
    }

    #[test]
    fn whose_file_it_may_be() {
        for (owner, mode, own, fine) in [
            (1000, 0o100_600, 1000, true),
            (0, 0o100_440, 1000, true),
            (0, 0o100_440, 0, false),
            (1000, 0o100_440, 1000, false),
            (0, 0o100_460, 1000, false),
            (0, 0o100_444, 1000, false),
            (1001, 0o100_600, 1000, false),
        ] {
            assert_eq!(check_owner(owner, mode, own, "key").is_ok(), fine, "{owner} {mode:o} {own}");
        }
    }

    #[test]
    fn one_newline_is_cut() {
        for (from, to) in
            [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a", "a"), ("a\r", "a\r"), ("\n", "")]
        {
            assert_eq!(without_newline(from.as_bytes()), to.as_bytes(), "{from:?}");
        }
    }
}
