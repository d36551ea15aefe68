//! From what the caller said to a connection: which broker, with which token, by when.

use std::path::{Path, PathBuf};

use super::{CliError, Context};
use crate::client::{Address, ClientIdentity, Connection, TlsOptions, read_token_file};
use crate::secret::SecretValue;

/// Connects to the caller's broker, as the caller.
pub(super) async fn connect(context: &Context) -> Result<Connection, CliError> {
    let address = address(context)?;
    let token = token(context)?;
    let tls = tls(context)?;
    Ok(Connection::open_with(&address, &tls, token.as_ref(), context.global.timeout).await?)
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
        return Ok(Some(read_token_file(path)?));
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

/// Whom to trust and what to present, should the broker be an `https://` one; the variables may be set for all.
fn tls(context: &Context) -> Result<TlsOptions, CliError> {
    let global = &context.global;
    let file = |given: &Option<PathBuf>, variable: &str| {
        given.clone().or_else(|| context.environ.path(variable).map(Path::to_owned))
    };
    let certificate = file(&global.client_cert, "CLAVIGER_CLIENT_CERT");
    let key = file(&global.client_key, "CLAVIGER_CLIENT_KEY");
    Ok(TlsOptions {
        ca_file: file(&global.ca_file, "CLAVIGER_CA_FILE"),
        identity: ClientIdentity::pair(certificate, key)?,
        server_name: None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::context;
    use super::*;
    use crate::error::Reason;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_file_comes_before_the_variable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "from-file\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
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
        assert_eq!(error.reason, Some(Reason::InvalidArgument));
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

    #[test]
    fn certificates_are_named_by_option_or_variable_and_in_pairs() {
        let variables = [
            ("CLAVIGER_CA_FILE", "/v/ca"),
            ("CLAVIGER_CLIENT_CERT", "/v/cert"),
            ("CLAVIGER_CLIENT_KEY", "/v/key"),
        ];
        let found = tls(&context(&["--ca-file", "/o/ca", "--client-key", "/o/key"], &variables)).unwrap();
        let identity = ClientIdentity { certificate: "/v/cert".into(), key: "/o/key".into() };
        let expected =
            TlsOptions { ca_file: Some("/o/ca".into()), identity: Some(identity), server_name: None };
        assert_eq!(found, expected);
        assert_eq!(tls(&context(&[], &[])).unwrap(), TlsOptions::default());
        let error = tls(&context(&["--client-cert", "/o/cert"], &[])).unwrap_err();
        assert_eq!(error.reason, Some(Reason::InvalidArgument));
        assert!(error.message.contains("--client-key"), "{}", error.message);
    }
}
