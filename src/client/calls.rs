//! The client of one program: typed calls, each with a deadline, tried again where that does no harm.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::answers::{
    Answer, Consumer, Description, Expected, Listed, PutOptions, Query, RolledBack, ToReference, Written,
};
use super::builder::{Builder, checked_reason};
use super::connection::Secrets;
use super::error::ClientError;
use super::keeper::Keepers;
use super::retry::Again;
use super::session::Session;
use super::wire;
use crate::proto::v1;
use crate::secret::{EnvironmentName, Reference, SecretId, SecretValue, VersionId};

/// How many names a page of a list has at most.
const PAGE: i32 = 100;

/// A broker, as one program sees it. Cheap to clone; all clones share one connection and what they keep.
///
/// Every call has the deadline that the builder was told (5 s where it was told none). Within it, a call that can do no
/// harm twice is tried again where the broker or its store was away, or one of them asked to slow down: reads, and
/// [`put`](Self::put), which has a token of its own that makes the second attempt find the work of the first.
/// [`rollback`](Self::rollback), [`delete`](Self::delete) and [`restore`](Self::restore) are tried again only where the
/// broker turned them away at its door.
///
/// ```no_run
/// use claviger::client::{Client, ClientError};
/// use claviger::secret::SecretValue;
///
/// # async fn example() -> Result<(), ClientError> {
/// let client = Client::builder().environment("production").consumer("orders").build().await?;
/// let password: SecretValue = client.get("database#password").await?;
/// let connected = connect("orders", password.expose_text().unwrap_or_default());
/// # Ok(())
/// # }
/// # fn connect(user: &str, password: &str) {}
/// ```
#[derive(Clone)]
pub struct Client {
    session: Arc<Session>,
    settings: Arc<Settings>,
    keepers: Arc<Keepers>,
    reason: Arc<str>,
}

#[derive(Debug)]
pub(super) struct Settings {
    pub(super) environment: Option<EnvironmentName>,
    pub(super) consumer: Option<String>,
    pub(super) stale_for: Duration,
}

impl Client {
    /// A builder that knows nothing yet.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(super) fn new(session: Session, settings: Settings, reason: Arc<str>) -> Self {
        let (session, settings) = (Arc::new(session), Arc::new(settings));
        Self { session, settings, keepers: Arc::default(), reason }
    }

    /// The same client, whose calls say another reason. What is kept by [`cached`](Self::cached) keeps the reason that
    /// it was first asked for with.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`](crate::error::Reason::InvalidArgument) for one of more than 512 bytes.
    pub fn because(&self, reason: &str) -> Result<Self, ClientError> {
        Ok(Self { reason: Arc::from(checked_reason(reason)?), ..self.clone() })
    }

    /// The value of the current version of a secret, or of one of its fields.
    ///
    /// ```no_run
    /// # use claviger::client::{Client, ClientError};
    /// # async fn example(client: &Client) -> Result<(), ClientError> {
    /// let whole = client.get("jwt").await?;
    /// let field = client.get("database#password").await?;
    /// let other = client.get("staging:database#password").await?;
    /// let apart = client.get(("database", "password")).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ClientError`]; its reason says whether the secret is not there, denied, or out of reach.
    pub async fn get(&self, reference: impl ToReference) -> Result<SecretValue, ClientError> {
        let answer = self.read(&Query::new(reference)?).await?;
        answer.value.ok_or_else(|| ClientError::malformed("holds no value"))
    }

    /// One version, with all that the broker says about it.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn read(&self, query: &Query) -> Result<Answer, ClientError> {
        let id = self.id(&query.reference)?;
        let request = v1::GetSecretRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            field: field(&query.reference),
            selector: wire::selector(&query.selector),
            if_version_id: text(query.unless.as_ref()),
            refresh: query.refresh,
            reason: self.reason.to_string(),
            approval_id: String::new(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.get_secret(request).await }
        };
        let answer = self.session.ask(Again::Harmless, send).await?;
        wire::answer(answer.secret.ok_or_else(|| ClientError::malformed("holds no secret"))?)
    }

    /// Up to 500 versions in one call, each with its own answer, in the order asked.
    ///
    /// ```no_run
    /// # use claviger::client::{Client, ClientError, Query};
    /// # async fn example(client: &Client) -> Result<(), ClientError> {
    /// let queries = [Query::new("database#password")?, Query::new("jwt#secret")?];
    /// for answer in client.batch(&queries).await? {
    ///     match answer {
    ///         Ok(found) => println!("{} is at version {}", found.id, found.version.id),
    ///         Err(error) => eprintln!("{error}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Where the batch as a whole was not answered.
    pub async fn batch(&self, queries: &[Query]) -> Result<Vec<Result<Answer, ClientError>>, ClientError> {
        let items: Result<Vec<_>, _> = queries.iter().map(|query| self.item(query)).collect();
        let request = v1::BatchGetSecretsRequest {
            items: items?,
            refresh: queries.iter().any(|query| query.refresh),
            reason: self.reason.to_string(),
            ..v1::BatchGetSecretsRequest::default()
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.batch_get_secrets(request).await }
        };
        let answer = self.session.ask(Again::Harmless, send).await?;
        if answer.results.len() != queries.len() {
            return Err(ClientError::malformed("leaves items out"));
        }
        Ok(answer.results.into_iter().map(outcome).collect())
    }

    /// The names of the environment's secrets that begin with `prefix`, all of them, in the store's order.
    ///
    /// # Errors
    /// As [`get`](Self::get); where no environment was chosen.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Listed>, ClientError> {
        let mut request = v1::ListSecretsRequest {
            environment: self.environment()?.to_string(),
            prefix: prefix.to_owned(),
            page_size: PAGE,
            reason: self.reason.to_string(),
            ..v1::ListSecretsRequest::default()
        };
        let mut all = Vec::new();
        loop {
            let send = |mut secrets: Secrets| {
                let request = request.clone();
                async move { secrets.list_secrets(request).await }
            };
            let page = self.session.ask(Again::Harmless, send).await?;
            for listed in &page.secrets {
                all.push(wire::listed(listed)?);
            }
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            if page.next_page_token == request.page_token {
                return Err(ClientError::malformed("gives the same page for ever"));
            }
            request.page_token = page.next_page_token;
        }
    }

    /// A secret's versions and labels, without any value.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn describe(&self, secret: impl ToReference) -> Result<Description, ClientError> {
        let id = self.whole(secret)?;
        let request = v1::DescribeSecretRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            reason: self.reason.to_string(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.describe_secret(request).await }
        };
        wire::description(&self.session.ask(Again::Harmless, send).await?)
    }

    /// Writes a version, which becomes current; creates the secret where it does not exist.
    ///
    /// ```no_run
    /// # use claviger::client::{Client, ClientError};
    /// # use claviger::secret::SecretValue;
    /// # async fn example(client: &Client) -> Result<(), ClientError> {
    /// let written = client.put("jwt", &SecretValue::text("a new signing key".to_owned())?).await?;
    /// println!("version {}", written.version.id);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn put(&self, secret: impl ToReference, value: &SecretValue) -> Result<Written, ClientError> {
        self.put_with(secret, value, PutOptions::default()).await
    }

    /// The same, under conditions.
    ///
    /// # Errors
    /// As [`get`](Self::get); [`Reason::Conflict`](crate::error::Reason::Conflict) where what was expected is not so.
    pub async fn put_with(
        &self,
        secret: impl ToReference,
        value: &SecretValue,
        options: PutOptions,
    ) -> Result<Written, ClientError> {
        let id = self.whole(secret)?;
        let request = v1::PutSecretRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            payload: Some(wire::payload(value)),
            // One for all attempts: the second finds the work of the first.
            client_request_token: options.token.unwrap_or_else(VersionId::generate).to_string(),
            labels: options.labels.iter().map(ToString::to_string).collect(),
            must_not_exist: options.expected == Expected::Absent,
            expected_version_id: match options.expected {
                Expected::Version(version) => version.to_string(),
                Expected::Anything | Expected::Absent => String::new(),
            },
            allow_empty: options.allow_empty,
            reason: self.reason.to_string(),
            approval_id: String::new(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.put_secret(request).await }
        };
        wire::written(&self.session.ask(Again::Repeatable, send).await?)
    }

    /// Makes an earlier version current again: `to`, or the one before (AWSPREVIOUS).
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn rollback(
        &self,
        secret: impl ToReference,
        to: Option<&VersionId>,
    ) -> Result<RolledBack, ClientError> {
        let id = self.whole(secret)?;
        let request = v1::RollbackSecretRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            to_version_id: text(to),
            reason: self.reason.to_string(),
            ..v1::RollbackSecretRequest::default()
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.rollback_secret(request).await }
        };
        wire::rolled_back(&self.session.ask(Again::TurnedAway, send).await?)
    }

    /// Deletes a secret. It can be restored for so many days, 7 to 30 (`None`: 30); the answer says until when.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn delete(&self, secret: impl ToReference, days: Option<u8>) -> Result<Timestamp, ClientError> {
        let id = self.whole(secret)?;
        let request = v1::DeleteSecretRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            recovery_window_days: days.map_or(0, i32::from),
            reason: self.reason.to_string(),
            approval_id: String::new(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.delete_secret(request).await }
        };
        wire::time(self.session.ask(Again::TurnedAway, send).await?.deletion_at)
    }

    /// Brings a deleted secret back.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn restore(&self, secret: impl ToReference) -> Result<(), ClientError> {
        let id = self.whole(secret)?;
        let request = v1::RestoreSecretRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            reason: self.reason.to_string(),
            approval_id: String::new(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.restore_secret(request).await }
        };
        self.session.ask(Again::TurnedAway, send).await.map(drop)
    }

    /// Says which version this program runs on now; the answer says whether that one is current.
    ///
    /// # Errors
    /// As [`get`](Self::get); where the builder was told no consumer.
    pub async fn report_in_use(
        &self,
        secret: impl ToReference,
        version: &VersionId,
    ) -> Result<bool, ClientError> {
        let id = self.whole(secret)?;
        let request = v1::ReportVersionInUseRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            consumer: self.consumer()?.to_owned(),
            version_id: version.to_string(),
            reason: self.reason.to_string(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.report_version_in_use(request).await }
        };
        Ok(self.session.ask(Again::Repeatable, send).await?.current)
    }

    /// Who uses a secret, and which version of it.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn consumers(&self, secret: impl ToReference) -> Result<Vec<Consumer>, ClientError> {
        let id = self.whole(secret)?;
        let request = v1::ListConsumersRequest {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            reason: self.reason.to_string(),
        };
        let send = |mut secrets: Secrets| {
            let request = request.clone();
            async move { secrets.list_consumers(request).await }
        };
        let answer = self.session.ask(Again::Harmless, send).await?;
        answer.consumers.into_iter().map(wire::consumer).collect()
    }

    pub(super) const fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn keepers(&self) -> &Keepers {
        &self.keepers
    }

    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    pub(super) fn consumer(&self) -> Result<&str, ClientError> {
        self.settings.consumer.as_deref().ok_or_else(|| {
            ClientError::invalid("who uses the secret? name this program with the builder's `consumer`")
        })
    }

    /// The secret that a reference means, all of it.
    pub(super) fn whole(&self, secret: impl ToReference) -> Result<SecretId, ClientError> {
        let reference = secret.to_reference()?;
        match &reference.field {
            None => self.id(&reference),
            Some(_) => Err(ClientError::invalid(format!(
                "`{reference}` names a field, and this is about the whole secret; write `{}`",
                reference.name
            ))),
        }
    }

    fn id(&self, reference: &Reference) -> Result<SecretId, ClientError> {
        let environment = match &reference.environment {
            Some(named) => named,
            None => self.environment()?,
        };
        Ok(SecretId::new(environment.clone(), reference.name.clone()))
    }

    fn environment(&self) -> Result<&EnvironmentName, ClientError> {
        self.settings.environment.as_ref().ok_or_else(|| {
            ClientError::invalid(
                "which environment? name one with the builder's `environment`, or write `environment:name`",
            )
        })
    }

    fn item(&self, query: &Query) -> Result<v1::SecretQuery, ClientError> {
        let id = self.id(&query.reference)?;
        Ok(v1::SecretQuery {
            environment: id.environment.to_string(),
            name: id.name.to_string(),
            field: field(&query.reference),
            selector: wire::selector(&query.selector),
            if_version_id: text(query.unless.as_ref()),
        })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("settings", &self.settings).finish_non_exhaustive()
    }
}

fn outcome(result: v1::BatchGetSecretsResult) -> Result<Answer, ClientError> {
    use v1::batch_get_secrets_result::Result as Outcome;
    match result.result {
        Some(Outcome::Secret(secret)) => wire::answer(secret),
        Some(Outcome::Problem(problem)) => Err(problem.into()),
        None => Err(ClientError::malformed("leaves an item out")),
    }
}

fn field(reference: &Reference) -> String {
    reference.field.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn text(version: Option<&VersionId>) -> String {
    version.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::session::Credential;
    use crate::client::tls::TlsOptions;
    use crate::clock::SystemClock;
    use crate::error::Reason;

    /// A client of a socket that takes connections and answers nothing.
    async fn client(
        folder: &std::path::Path,
        environment: Option<&str>,
    ) -> (Client, tokio::net::UnixListener) {
        let path = folder.join("x.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let address = super::super::Address::Unix(path);
        let timeout = Duration::from_secs(60);
        let clock = SystemClock::shared();
        let session = Session::open(&address, &TlsOptions::default(), Credential::Itself, timeout, clock)
            .await
            .unwrap();
        let environment = environment.map(|name| name.parse().unwrap());
        let settings = Settings { environment, consumer: None, stale_for: timeout };
        (Client::new(session, settings, Arc::from("")), listener)
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_not_sent() {
        let folder = tempfile::tempdir().unwrap();
        let (client, _listener) = client(folder.path(), None).await;
        let asked = client.get("database").await.unwrap_err();
        assert!(asked.message.contains("which environment"), "{asked}");
        assert_eq!(client.get("a//b").await.unwrap_err().reason, Reason::InvalidName);
        let field = client.describe("staging:db#password").await.unwrap_err();
        assert!(field.message.contains("write `db`"), "{field}");
        let version = VersionId::generate();
        let nobody = client.report_in_use("staging:db", &version).await.unwrap_err();
        assert!(nobody.message.contains("consumer"), "{nobody}");
        assert!(client.list("").await.unwrap_err().message.contains("which environment"));
        assert!(client.because(&"x".repeat(513)).is_err());
    }

    #[tokio::test]
    async fn a_reference_may_name_its_environment() {
        let folder = tempfile::tempdir().unwrap();
        let (client, _listener) = client(folder.path(), Some("production")).await;
        assert_eq!(client.whole("db").unwrap().to_string(), "production:db");
        assert_eq!(client.whole("staging:db").unwrap().to_string(), "staging:db");
        let query = Query::new("db#password").unwrap().refreshed();
        let item = client.item(&query).unwrap();
        assert_eq!((item.environment.as_str(), item.field.as_str()), ("production", "password"));
    }
}
