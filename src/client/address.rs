//! Where a broker listens, as people write it.

use std::fmt;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use http::Uri;

use super::error::ClientError;

/// The socket of the system's broker.
pub const SYSTEM_SOCKET: &str = "/run/claviger/claviger.sock";
/// The file name of a broker's socket.
pub const SOCKET_NAME: &str = "claviger.sock";

/// What to do where no broker answers.
pub(super) const MEND: &str = "start one with `claviger dev` or `claviger serve`, or set --address";

/// Where a broker listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket, by its absolute path.
    Unix(PathBuf),
    /// Plain HTTP/2 on a loopback address.
    Http(Uri),
    /// HTTP/2 over TLS 1.3.
    Https(Uri),
}

impl Address {
    /// Parses `unix:///path`, `https://host[:port]` (port 443 where none is said), or `http://host[:port]`, the latter
    /// only where the host is a loopback address.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`](crate::error::Reason::InvalidArgument). Of a URL it names scheme and host alone:
    /// people put passwords and tokens into the rest.
    pub fn parse(text: &str) -> Result<Self, ClientError> {
        let refuse = |problem: &str| ClientError::invalid(format!("address `{}`: {problem}", repeated(text)));
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("unix", _)) => {
                Err(refuse("the path of a socket is absolute; write unix:///run/claviger/claviger.sock"))
            }
            Some(("http", _)) => origin(text).and_then(loopback).map(Self::Http).map_err(refuse),
            Some(("https", _)) => origin(text).map(Self::Https).map_err(refuse),
            _ => Err(refuse("is neither unix:///path, https://host:port nor http://host:port")),
        }
    }

    /// The first of the places where a broker of this machine listens that has a socket: `claviger.sock` in the
    /// caller's runtime folder (`$XDG_RUNTIME_DIR`, where there is one), then [`SYSTEM_SOCKET`].
    ///
    /// # Errors
    /// [`Reason::Unavailable`](crate::error::Reason::Unavailable) where there is none; names the places.
    pub fn find(runtime_folder: Option<&Path>) -> Result<Self, ClientError> {
        let own = runtime_folder.map(|folder| folder.join(SOCKET_NAME));
        let places: Vec<PathBuf> = own.into_iter().chain([PathBuf::from(SYSTEM_SOCKET)]).collect();
        if let Some(found) = places.iter().find(|place| place.exists()) {
            return Ok(Self::Unix(found.clone()));
        }
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        let message = format!("no broker: there is no socket at {}; {MEND}", places.join(" or "));
        Err(ClientError::unavailable(message))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = |uri: &Uri| uri.authority().map(ToString::to_string).unwrap_or_default();
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http(uri) => write!(f, "http://{}", authority(uri)),
            Self::Https(uri) => write!(f, "https://{}", authority(uri)),
        }
    }
}

/// As much of an address as an error repeats: of a URL its scheme and host, of a path all of it; nothing that stands
/// before an `@`, and no token.
fn repeated(text: &str) -> String {
    const MOST: usize = 128;
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let host = match scheme {
        "unix" => rest,
        // The last one: a password may hold others.
        _ => rest.rsplit_once('@').map_or(rest, |(_, behind)| behind),
    };
    let host = match scheme {
        "" | "unix" => host,
        _ => host.split(['/', '?', '#']).next().unwrap_or_default(),
    };
    let host = host.split_once("clv_").map_or(host, |(before, _)| before);
    let separator = if text.contains("://") { "://" } else { "" };
    let shown = scheme.chars().chain(separator.chars()).chain(host.chars());
    shown.take(MOST).flat_map(char::escape_default).collect()
}

/// A URL that says where, and nothing else.
fn origin(text: &str) -> Result<Uri, &'static str> {
    let uri: Uri =
        text.parse().map_err(|_| "is not a URL; write http://127.0.0.1:port or https://host:port")?;
    let authority = uri.authority().filter(|authority| !authority.host().is_empty());
    let authority = authority.ok_or("names no host; write http://127.0.0.1:port or https://host:port")?;
    if authority.as_str().contains('@') {
        return Err("holds a user name; a token goes into CLAVIGER_TOKEN or a --token-file");
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err("has a path or a query; write http://127.0.0.1:port or https://host:port");
    }
    // The URL library takes a port that is none for no port at all.
    if !authority.as_str().strip_prefix(authority.host()).is_some_and(is_port) {
        return Err("has a port that is not a number from 1 to 65535");
    }
    Ok(uri)
}

/// Whether what stands behind a host is a port, or nothing.
fn is_port(behind: &str) -> bool {
    behind.is_empty()
        || behind.strip_prefix(':').is_some_and(|port| {
            port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<NonZeroU16>().is_ok()
        })
}

/// An address that plain HTTP may be spoken to.
fn loopback(uri: Uri) -> Result<Uri, &'static str> {
    let host = host(&uri);
    if host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
        return Ok(uri);
    }
    Err(
        "would send secrets in the clear; plain http:// is for loopback addresses, use https:// or unix:///path",
    )
}

/// The host of a URL; of an IPv6 address without its brackets.
pub(super) fn host(uri: &Uri) -> &str {
    uri.host().unwrap_or_default().trim_matches(['[', ']'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[test]
    fn addresses_are_sockets_loopback_or_encrypted() {
        assert_eq!(Address::parse("unix:///run/c.sock").unwrap(), Address::Unix("/run/c.sock".into()));
        for good in [
            "http://127.0.0.1:8400",
            "http://localhost:8400",
            "http://[::1]:8400",
            "http://127.9.9.9",
            "http://[::1]:1/",
        ] {
            assert!(matches!(Address::parse(good), Ok(Address::Http(_))), "{good}");
        }
        for good in [
            "https://broker.example:8400",
            "https://10.0.0.1",
            "https://[2001:db8::1]",
            "https://[2001:db8::1]:1/",
            "https://broker.example:65535",
        ] {
            assert!(matches!(Address::parse(good), Ok(Address::Https(_))), "{good}");
        }
        assert_eq!(
            Address::parse("https://broker.example:1/").unwrap().to_string(),
            "https://broker.example:1"
        );
        assert_eq!(Address::parse("http://[::1]:8400/").unwrap().to_string(), "http://[::1]:8400");
    }

    #[test]
    fn other_addresses_are_refused_with_a_mend() {
        for (bad, part) in [
            ("", "neither"),
            ("/run/c.sock", "neither"),
            ("unix:/run/c.sock", "neither"),
            ("unix://run/c.sock", "absolute"),
            ("unix://", "absolute"),
            ("http://10.0.0.1:8400", "in the clear"),
            ("http://example.com", "in the clear"),
            ("http://127.0.0.1.example.com", "in the clear"),
            ("http://0.0.0.0:1", "in the clear"),
            ("http://me@127.0.0.1", "user name"),
            ("http://127.0.0.1/v1", "path"),
            ("http://127.0.0.1?x=1", "path"),
            ("https://localhost:99999", "port that is not a number from 1 to 65535"),
            ("https://localhost:65536", "port"),
            ("https://localhost:0", "port"),
            ("https://localhost:", "port"),
            ("https://localhost:+80/", "port"),
            ("https://localhost:https", "port"),
            ("https://[::1]:99999", "port"),
            ("http://127.0.0.1:99999", "port"),
            ("http://[::1]:0", "port"),
            ("http://", "URL"),
            ("https://me@broker.example", "user name"),
            ("https://broker.example/v1", "path"),
            ("ftp://127.0.0.1", "neither"),
            ("unix://a\nb", "absolute"),
        ] {
            let error = Address::parse(bad).unwrap_err();
            assert_eq!(error.reason, Reason::InvalidArgument, "{bad}");
            assert!(error.message.contains(part), "{bad}: {}", error.message);
            assert!(!error.message.contains('\n'), "{bad}");
        }
    }

    #[test]
    fn what_is_secret_in_an_address_is_not_repeated() {
        for (bad, shown) in [
            ("http://me:s3cret@127.0.0.1:8400", "`http://127.0.0.1:8400`"),
            ("http://me:s3cret@example.com", "`http://example.com`"),
            ("http://me:s3cret/s3cret@s3cret@example.com/x", "`http://example.com`"),
            ("http://me:s3cret @example.com", "`http://example.com`"),
            ("http://s3cret@", "`http://`"),
            ("http://127.0.0.1/?token=s3cret", "`http://127.0.0.1`"),
            ("https://me:s3cret@example.com", "`https://example.com`"),
            ("ftp://me:s3cret@example.com", "`ftp://example.com`"),
            ("me:s3cret@example.com", "`example.com`"),
            ("clv_0123456789abcdef_s3cret", "``"),
            ("unix://run/c@1.sock", "`unix://run/c@1.sock`"),
        ] {
            let message = Address::parse(bad).unwrap_err().message;
            assert!(message.contains(shown) && !message.contains("s3cret"), "{bad}: {message}");
        }
    }

    #[test]
    fn the_runtime_folder_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join(SOCKET_NAME);
        std::fs::write(&socket, "").unwrap();
        assert_eq!(Address::find(Some(folder.path())).unwrap(), Address::Unix(socket.clone()));
        std::fs::remove_file(&socket).unwrap();
        if !Path::new(SYSTEM_SOCKET).exists() {
            let error = Address::find(Some(folder.path())).unwrap_err();
            assert_eq!(error.reason, Reason::Unavailable);
            assert!(
                error.message.contains(SYSTEM_SOCKET) && error.message.contains("claviger dev"),
                "{error}"
            );
        }
    }
}
