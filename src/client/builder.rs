//! How a [`Client`] is put together.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::address::Address;
use super::calls::{Client, Settings};
use super::connection::LONGEST_DEADLINE;
use super::error::ClientError;
use super::session::{Credential, Session};
use super::tls::{ClientIdentity, TlsOptions};
use crate::clock::{SharedClock, SystemClock};
use crate::secret::{EnvironmentName, SecretValue};

/// How long a call may take, where nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a kept value stands in for a broker that is away, where nothing else is said.
const STALE_FOR: Duration = Duration::from_secs(3_600);
/// The bound that records have too, in bytes.
const LONGEST_REASON: usize = 512;
const LONGEST_CONSUMER: usize = 128;

/// Puts a [`Client`] together; see [`Client::builder`].
///
/// ```no_run
/// use std::time::Duration;
/// use claviger::client::{Client, ClientError, TlsOptions};
///
/// # async fn example() -> Result<(), ClientError> {
/// let client = Client::builder()
///     .address("https://secrets.internal:7340")
///     .tls(TlsOptions { ca_file: Some("/etc/claviger/ca.pem".into()), ..TlsOptions::default() })
///     .environment("production")
///     .consumer("orders")
///     .token_file("/run/secrets/claviger-token")
///     .timeout(Duration::from_secs(2))
///     .build()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Builder {
    address: Option<String>,
    environment: Option<String>,
    consumer: Option<String>,
    reason: String,
    credential: Credential,
    tls: Option<TlsOptions>,
    timeout: Duration,
    stale_for: Duration,
    clock: SharedClock,
    variables: Variables,
}

/// What was found in an environment: it counts only where nothing else was said.
#[derive(Debug, Clone, Default)]
struct Variables {
    address: Option<String>,
    environment: Option<String>,
    token: Option<SecretValue>,
    tls: TlsOptions,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    runtime_folder: Option<PathBuf>,
    fault: Option<ClientError>,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            address: None,
            environment: None,
            consumer: None,
            reason: String::new(),
            credential: Credential::Itself,
            tls: None,
            timeout: TIMEOUT,
            stale_for: STALE_FOR,
            clock: SystemClock::shared(),
            variables: Variables::default(),
        }
    }

    /// The broker, as [`Address::parse`] has it. Without it, the socket of this machine's broker, as
    /// [`Address::find`] has it.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// The environment that is meant where a reference names none. There is no default.
    pub fn environment(mut self, environment: impl Into<String>) -> Self {
        self.environment = Some(environment.into());
        self
    }

    /// What this program calls itself to whoever asks who uses a secret: 1 to 128 printable ASCII characters without
    /// spaces. Needed by [`Client::cached`] and [`Client::report_in_use`].
    pub fn consumer(mut self, consumer: impl Into<String>) -> Self {
        self.consumer = Some(consumer.into());
        self
    }

    /// Why this program asks, at most 512 bytes: recorded with every call, and policies may ask for it.
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.reason = reason.into();
        self
    }

    /// The token that this program is known by. Without one, it is known by its Unix user on a Unix socket, or by its
    /// client certificate.
    pub fn token(mut self, token: SecretValue) -> Self {
        self.credential = Credential::Token(token);
        self
    }

    /// The file with the token (as [`read_token_file`](super::read_token_file) has it). It is read now, and again
    /// whenever the broker no longer takes the token: whoever renews it writes a new file and tells nobody.
    pub fn token_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.credential = Credential::File(path.into());
        self
    }

    /// Whom an `https://` broker must have its certificate from, and the certificate that this program presents. The
    /// files are read for every connection anew.
    pub fn tls(mut self, options: TlsOptions) -> Self {
        self.tls = Some(options);
        self
    }

    /// How long a call may take with all its attempts, at most [`LONGEST_DEADLINE`]; default 5 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long a value kept by [`Client::cached`] stands in for a broker that is away; default 1 h.
    pub fn stale_for(mut self, stale_for: Duration) -> Self {
        self.stale_for = stale_for;
        self
    }

    /// What tells the time, for tests that say what time it is.
    pub fn clock(mut self, clock: SharedClock) -> Self {
        self.clock = clock;
        self
    }

    /// Takes from a process's environment what was not said otherwise: `CLAVIGER_ADDR`, `CLAVIGER_ENV`,
    /// `CLAVIGER_TOKEN`, `CLAVIGER_CA_FILE`, `CLAVIGER_CLIENT_CERT`, `CLAVIGER_CLIENT_KEY`, and `XDG_RUNTIME_DIR`, where
    /// a broker's socket may be. The same as the command line knows; this library reads no environment by itself.
    ///
    /// ```no_run
    /// # use claviger::client::{Client, ClientError};
    /// # async fn example() -> Result<(), ClientError> {
    /// let client = Client::builder().variables(std::env::vars_os()).build().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn variables(mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        for (name, value) in variables {
            if let Some(name) = name.to_str() {
                self.variables.take(name, value);
            }
        }
        self
    }

    /// Connects. While nobody answers it tries again, as long as a call may take.
    ///
    /// # Errors
    /// What was said and can't be used; [`Reason::Unavailable`](crate::error::Reason::Unavailable) where no broker
    /// answers, [`Reason::Unauthenticated`](crate::error::Reason::Unauthenticated) where the wrong one does. Whether
    /// the broker takes the credential shows at the first call.
    pub async fn build(self) -> Result<Client, ClientError> {
        let Self { variables, .. } = self;
        if let Some(fault) = variables.fault {
            return Err(fault);
        }
        let environment = self.environment.or(variables.environment);
        let environment = environment.map(|text| EnvironmentName::parse(&text)).transpose()?;
        let consumer = self.consumer.map(checked_consumer).transpose()?;
        let reason = checked_reason(&self.reason)?;
        let timeout = checked_timeout(self.timeout)?;
        let address = match self.address.or(variables.address) {
            Some(text) => Address::parse(&text)?,
            None => Address::find(variables.runtime_folder.as_deref())?,
        };
        let credential = match (self.credential, variables.token) {
            (Credential::Itself, Some(token)) => Credential::Token(token),
            (said, _) => said,
        };
        let identity = ClientIdentity::pair(variables.certificate, variables.key)?;
        let tls = self.tls.unwrap_or(TlsOptions { identity, ..variables.tls });
        let session = Session::open(&address, &tls, credential, timeout, self.clock).await?;
        let settings = Settings { environment, consumer, stale_for: self.stale_for };
        Ok(Client::new(session, settings, Arc::from(reason)))
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Variables {
    fn take(&mut self, name: &str, value: OsString) {
        match name {
            "CLAVIGER_TOKEN" if value.is_empty() => {
                let problem = "CLAVIGER_TOKEN is set and empty; unset it, or set the token";
                self.fault.get_or_insert(ClientError::invalid(problem));
            }
            // One that is empty counts as not set.
            _ if value.is_empty() => {}
            "CLAVIGER_CA_FILE" => self.tls.ca_file = Some(value.into()),
            "CLAVIGER_CLIENT_CERT" => self.certificate = Some(value.into()),
            "CLAVIGER_CLIENT_KEY" => self.key = Some(value.into()),
            "XDG_RUNTIME_DIR" => self.runtime_folder = Some(value.into()),
            "CLAVIGER_ADDR" => self.address = self.text(name, value),
            "CLAVIGER_ENV" => self.environment = self.text(name, value),
            "CLAVIGER_TOKEN" => {
                let token = self.text(name, value).map(SecretValue::text).transpose();
                match token {
                    Ok(token) => self.token = token,
                    Err(error) => {
                        self.fault.get_or_insert(error.into());
                    }
                }
            }
            _ => {}
        }
    }

    fn text(&mut self, name: &str, value: OsString) -> Option<String> {
        let text = value.into_string();
        if text.is_err() {
            let problem = format!("{name} is not UTF-8; set it anew");
            self.fault.get_or_insert(ClientError::invalid(problem));
        }
        text.ok()
    }
}

fn checked_consumer(consumer: String) -> Result<String, ClientError> {
    let fits = (1..=LONGEST_CONSUMER).contains(&consumer.len());
    if fits && consumer.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(consumer);
    }
    let shown: String = consumer.escape_default().take(LONGEST_CONSUMER).collect();
    Err(ClientError::invalid(format!(
        "consumer `{shown}`: is not 1 to {LONGEST_CONSUMER} printable ASCII characters without spaces; \
         name the service, for example `orders`"
    )))
}

pub(super) fn checked_reason(reason: &str) -> Result<&str, ClientError> {
    match reason.len() {
        ..=LONGEST_REASON => Ok(reason),
        length => Err(ClientError::invalid(format!(
            "reason: {length} bytes given; at most {LONGEST_REASON} are permitted"
        ))),
    }
}

fn checked_timeout(timeout: Duration) -> Result<Duration, ClientError> {
    match timeout.is_zero() || timeout > LONGEST_DEADLINE {
        false => Ok(timeout),
        true => Err(ClientError::invalid(format!(
            "timeout: {timeout:?} given; more than nothing and at most {LONGEST_DEADLINE:?} are permitted"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    async fn refused(builder: Builder) -> ClientError {
        builder.build().await.map(drop).unwrap_err()
    }

    fn builder() -> Builder {
        Client::builder().address("unix:///nonexistent/x.sock").timeout(Duration::from_millis(1))
    }

    fn variables(pairs: &[(&str, &str)]) -> Builder {
        builder().variables(pairs.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[tokio::test]
    async fn what_can_not_be_used_is_said_before_anything_is_tried() {
        for (bad, reason, part) in [
            (builder().environment("Prod"), Reason::InvalidEnvironment, "Prod"),
            (builder().consumer("two words"), Reason::InvalidArgument, "two words"),
            (builder().consumer(""), Reason::InvalidArgument, "consumer"),
            (builder().consumer("x".repeat(129)), Reason::InvalidArgument, "consumer"),
            (builder().reason("x".repeat(513)), Reason::InvalidArgument, "513"),
            (builder().timeout(Duration::ZERO), Reason::InvalidArgument, "timeout"),
            (builder().timeout(LONGEST_DEADLINE * 2), Reason::InvalidArgument, "3600s"),
            (builder().address("ftp://x"), Reason::InvalidArgument, "ftp"),
            (builder().token_file("/nonexistent/token"), Reason::InvalidArgument, "/nonexistent/token"),
            (variables(&[("CLAVIGER_TOKEN", "")]), Reason::InvalidArgument, "CLAVIGER_TOKEN"),
            (variables(&[("CLAVIGER_CLIENT_CERT", "/c")]), Reason::InvalidArgument, "CLAVIGER_CLIENT_KEY"),
            (variables(&[("CLAVIGER_CLIENT_KEY", "/k")]), Reason::InvalidArgument, "CLAVIGER_CLIENT_CERT"),
            (variables(&[("CLAVIGER_ENV", "Prod")]), Reason::InvalidEnvironment, "Prod"),
        ] {
            let error = refused(bad).await;
            assert_eq!(error.reason, reason, "{error}");
            assert!(error.message.contains(part), "{error}");
        }
    }

    #[tokio::test]
    async fn what_is_said_counts_more_than_what_is_found() {
        let found = [("CLAVIGER_ADDR", "ftp://found"), ("CLAVIGER_ENV", "Found")];
        let error = refused(variables(&found).environment("fine")).await;
        assert!(!error.message.contains("found"), "{error}");
        assert!(matches!(error.reason, Reason::Unavailable | Reason::DeadlineExceeded), "{error}");
        let none_said = Builder { address: None, ..variables(&found) };
        let error = refused(none_said.environment("fine")).await;
        assert!(error.message.contains("ftp://found"), "{error}");
    }

    #[test]
    fn no_token_is_shown() {
        let token = SecretValue::text("clv_canary".to_owned()).unwrap();
        let shown = format!("{:?}", variables(&[("CLAVIGER_TOKEN", "clv_canary")]).token(token));
        assert!(!shown.contains("canary"), "{shown}");
    }
}
