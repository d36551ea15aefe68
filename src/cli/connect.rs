//! From what the caller said to a connection: which broker, with which token, by when.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::{CliError, Context, without_newline};
use crate::client::{Address, Connection};
use crate::secret::SecretValue;

/// The largest token file. A token has 64 characters; another identity provider's may have more.
const LARGEST_TOKEN: usize = 16 * 1024;

/// Connects to the caller's broker, as the caller.
pub(super) async fn connect(context: &Context) -> Result<Connection, CliError> {
    let address = address(context)?;
    let token = token(context)?;
    Ok(Connection::open(&address, token.as_ref(), context.global.timeout).await?)
}

fn address(context: &Context) -> Result<Address, CliError> {
    let given = match &context.global.address {
        Some(text) => Some(text.as_str()),
        None => context.environ.text("CLAVIGER_ADDR")?,
    };
    match given {
        Some(text) => Ok(Address::parse(text)?),
        None => Ok(Address::find(context.environ.path("XDG_RUNTIME_DIR"))?),
    }
}

fn token(context: &Context) -> Result<Option<SecretValue>, CliError> {
    if let Some(path) = &context.global.token_file {
        if path.as_os_str().as_encoded_bytes().starts_with(b"clv_") {
            return Err(CliError::usage(
                "what --token-file names is a token, not a file's name; write it into a file or set CLAVIGER_TOKEN, and \
                 take this one for leaked: every process of this machine could read it",
            ));
        }
        return read_token(path).map(Some).map_err(|problem| CliError::file(path, problem));
    }
    // Whoever set it wants to be known by a token; what is left without one may be allowed more, or less.
    if context.environ.is_empty("CLAVIGER_TOKEN") {
        return Err(CliError::usage(
            "CLAVIGER_TOKEN is set and empty; unset it to be known by your Unix user, or set the token",
        ));
    }
    let token = context.environ.text("CLAVIGER_TOKEN")?;
    Ok(token.map(|token| SecretValue::text(token.to_owned())).transpose()?)
}

/// Reads a token file: regular, the caller's or root's, for nobody else's eyes. A link is followed, as orchestrators
/// mount tokens behind one; what it leads to is what is checked, on the open file. A newline at its end is no part of
/// the token.
fn read_token(path: &Path) -> Result<SecretValue, String> {
    // Not blocking: opening a pipe would wait for someone to write to it.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| format!("the token file can't be opened: {error}"))?;
    let file = File::from(file);
    let found = file.metadata().map_err(|error| format!("the token file can't be looked at: {error}"))?;
    if !found.is_file() {
        return Err("a token file is a regular file; this is a folder, a pipe or a device".to_owned());
    }
    if found.mode() & 0o077 != 0 {
        return Err(format!(
            "others may read the token file (mode {:o}); chmod 600 it",
            found.mode() & 0o777
        ));
    }
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own && found.uid() != 0 {
        return Err(format!("the token file belongs to uid {}; it must be yours or root's", found.uid()));
    }
    let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(LARGEST_TOKEN + 64));
    file.take(LARGEST_TOKEN as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("the token file can't be read: {error}"))?;
    let token = without_newline(&bytes);
    if token.is_empty() {
        return Err("the token file is empty; write the token into it".to_owned());
    }
    if bytes.len() > LARGEST_TOKEN {
        return Err(format!(
            "the token file is larger than {LARGEST_TOKEN} bytes; it holds one token and nothing else"
        ));
    }
    let token = std::str::from_utf8(token).map_err(|_| "the token file does not hold text".to_owned())?;
    SecretValue::text(token.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::tests::context;
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
            assert_eq!(read_token(&path).unwrap().expose_text(), Some("clv_1_x"), "{content:?}");
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read_token(&link).is_ok());
    }

    #[test]
    fn each_wrong_token_file_has_its_own_message() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let refused = |path: &Path| read_token(path).unwrap_err();
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
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(refused(&pipe).contains("pipe"));
    }

    #[test]
    fn the_file_comes_before_the_variable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        write(&path, b"from-file", 0o400);
        let variables = [("CLAVIGER_TOKEN", "from-variable")];
        let option = ["--token-file", path.to_str().unwrap()];
        let both = token(&context(&option, &variables)).unwrap().unwrap();
        assert_eq!(both.expose_text(), Some("from-file"));
        let variable = token(&context(&[], &variables)).unwrap().unwrap();
        assert_eq!(variable.expose_text(), Some("from-variable"));
        assert!(token(&context(&[], &[])).unwrap().is_none());
        assert!(token(&context(&option, &[("CLAVIGER_TOKEN", "")])).is_ok(), "the file is what counts");
        let error = token(&context(&[], &[("CLAVIGER_TOKEN", "")])).unwrap_err();
        assert_eq!(error.reason, Some(Reason::InvalidArgument));
        assert!(error.message.starts_with("CLAVIGER_TOKEN is set and empty"), "{}", error.message);
        let missing = ["--token-file", "/nonexistent/token"];
        let error = token(&context(&missing, &variables)).unwrap_err();
        assert!(error.message.starts_with("/nonexistent/token: "), "{}", error.message);
    }

    #[test]
    fn a_token_in_place_of_a_file_is_refused_unseen() {
        let given = format!("clv_{}_{}", "0".repeat(16), "s3cret".repeat(7));
        let error = token(&context(&["--token-file", &given], &[])).unwrap_err();
        assert_eq!(error.reason, Some(Reason::InvalidArgument));
        assert!(error.message.contains("is a token, not a file's name"), "{}", error.message);
        assert!(!error.message.contains("clv_"), "{}", error.message);
    }

    #[test]
    fn the_option_comes_before_the_variable() {
        let variables = [("CLAVIGER_ADDR", "unix:///b.sock")];
        let shown = |arguments: &[&str]| address(&context(arguments, &variables)).unwrap().to_string();
        assert_eq!(shown(&["-a", "unix:///a.sock"]), "unix:///a.sock");
        assert_eq!(shown(&[]), "unix:///b.sock");
        let error = address(&context(&["-a", "http://example.com"], &[])).unwrap_err();
        assert_eq!(error.reason, Some(Reason::InvalidArgument));
    }
}
