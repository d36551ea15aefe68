//! AWS Secrets Manager as a store: it keeps versions and labels itself, this asks it well.
//!
//! | file | what |
//! |---|---|
//! | `connect` | credentials, region, time limits, retries |
//! | `names` | `{environment}/{name}` and back |
//! | `read` | one value, many values |
//! | `describe` | labels, versions, lists |
//! | `write` | versions, labels, deletion |
//! | `errors` | AWS's codes as [`StoreError`] |
//! | `quota` | how often what may be asked |
//!
//! What AWS's API does not offer, and what follows:
//! - A write can't name what it expects to be current, and one that asks for AWSPENDING takes it from whoever holds
//!   it. [`put`](Store::put) therefore looks first and then writes: between the two, someone who does not go through
//!   this broker can still come first. Only the creation of a secret and a label's move are atomic.
//! - Changes have no number, so [`Order::Unknown`] is all that can be said.
//! - How often one may ask is bounded, most of all for batches. Every call waits for its turn under the [quotas of its
//!   account](Accounts).
//! - The SDK offers no wiping. A value is moved out of its answers without a copy and wiped from then on; the answer's
//!   bytes on their way (TLS, HTTP body, JSON and base64 decoding) and what a write hands to the SDK are freed unwiped.
//! - At level `TRACE` the crate `aws_smithy_runtime` logs requests with their bodies: `telemetry` keeps it above.

mod connect;
mod describe;
mod errors;
mod names;
mod quota;
mod read;
mod write;

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_sdk_secretsmanager::Client;
use aws_sdk_secretsmanager::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_secretsmanager::primitives::DateTime;
use jiff::Timestamp;

pub use connect::Bounds;
pub use quota::Accounts;

use self::errors::Failure;
use self::names::{DEFAULT_TEMPLATE, Names};
use self::quota::{Account, Operation, Place, Tally};
use self::read::Batches;
use super::{
    Description, Fetched, Freshness, ListPage, ListRequest, Put, RecoveryWindow, Store, StoreError, Upstream,
    Written,
};
use crate::clock::SharedClock;
use crate::environment::AwsSettings;
use crate::secret::{EnvironmentName, LabelMove, SecretId, Selector};

#[cfg(doc)]
use super::Order;

/// How many secrets one call may ask for (AWS Secrets Manager, `BatchGetSecretValue`, `SecretIdList`).
pub const MOST_IN_BATCH: usize = 20;

/// The secrets of one environment in one account and region of AWS.
pub struct Aws {
    environment: EnvironmentName,
    names: Names,
    client: Client,
    clock: SharedClock,
    place: Place,
    account: Arc<Account>,
    batches: Batches,
    tally: Tally,
}

impl Aws {
    /// Prepares to ask AWS with the credentials that the process finds around it. Asks nothing yet, except for the
    /// region where none is configured.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a name template that could mean two things, and where no region is known.
    pub async fn connect(
        environment: EnvironmentName,
        settings: &AwsSettings,
        clock: SharedClock,
    ) -> Result<Self, StoreError> {
        let names = names_of(&environment, settings)?;
        let client = connect::from_surroundings(&environment, settings).await?;
        Ok(Self::new(environment, names, client, settings, clock))
    }

    /// Prepares to ask AWS with given credentials, or with those of a role that is to be assumed with them, as tests and
    /// tools want it; nothing is taken from around the process. Asks nothing yet.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn with_credentials(
        environment: EnvironmentName,
        settings: &AwsSettings,
        credentials: Credentials,
        bounds: &Bounds,
        clock: SharedClock,
    ) -> Result<Self, StoreError> {
        let names = names_of(&environment, settings)?;
        let client = connect::with_credentials(&environment, settings, credentials, bounds).await?;
        Ok(Self::new(environment, names, client, settings, clock))
    }

    /// With quotas of its own, until it is told to share.
    fn new(
        environment: EnvironmentName,
        names: Names,
        client: Client,
        settings: &AwsSettings,
        clock: SharedClock,
    ) -> Self {
        let place = Place::of(settings, client.config().region().map(ToString::to_string));
        let account = Arc::new(Account::new(&clock));
        let (batches, tally) = (Batches::default(), Tally::default());
        Self { environment, names, client, clock, place, account, batches, tally }
    }

    /// Has it share the quotas of its account with the other stores of `accounts`.
    #[must_use]
    pub fn sharing(self, accounts: &Accounts) -> Self {
        Self { account: accounts.at(&self.place), ..self }
    }

    /// Makes a call when it is its turn under the account's quota.
    async fn ask<T, E>(
        &self,
        operation: Operation,
        call: impl Future<Output = Result<T, SdkError<E>>>,
    ) -> Result<T, Failure>
    where
        E: Error + ProvideErrorMetadata + 'static,
    {
        match self.account.admit(operation).await {
            Ok(waited) => self.tally.admitted(operation, waited),
            Err(late) => {
                self.tally.refused();
                let cause = format!(
                    "more calls of {operation:?} wait than the account's quota lets through in time; try again \
                     in {} ms",
                    late.retry_after.as_millis()
                );
                return Err(Failure::throttled(cause));
            }
        }
        call.await.map_err(Failure::from)
    }

    fn name_in_aws(&self, id: &SecretId) -> Result<String, StoreError> {
        self.serves(&id.environment)?;
        self.names.in_aws(id)
    }

    fn serves(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        if *environment == self.environment {
            return Ok(());
        }
        Err(StoreError::Invalid(format!(
            "this store serves environment `{}` and was asked for `{environment}`; ask that environment's own",
            self.environment
        )))
    }
}

impl fmt::Debug for Aws {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aws")
            .field("environment", &self.environment)
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Aws {
    async fn get(&self, id: &SecretId, selector: &Selector, _: Freshness) -> Result<Fetched, StoreError> {
        self.fetch(id, selector).await
    }

    async fn batch_get(
        &self,
        items: &[(SecretId, Selector)],
        _: Freshness,
    ) -> Vec<Result<Fetched, StoreError>> {
        self.fetch_many(items).await
    }

    async fn put(&self, id: &SecretId, put: Put) -> Result<Written, StoreError> {
        self.write(id, &put).await
    }

    async fn describe(&self, id: &SecretId) -> Result<Description, StoreError> {
        self.described(id).await
    }

    async fn list(
        &self,
        environment: &EnvironmentName,
        request: &ListRequest,
    ) -> Result<ListPage, StoreError> {
        self.serves(environment)?;
        self.page(request).await
    }

    async fn move_label(&self, id: &SecretId, change: &LabelMove) -> Result<Written, StoreError> {
        self.relabel(id, change).await
    }

    async fn delete(&self, id: &SecretId, window: RecoveryWindow) -> Result<Timestamp, StoreError> {
        self.delete_secret(id, window).await
    }

    async fn restore(&self, id: &SecretId) -> Result<(), StoreError> {
        self.restore_secret(id).await
    }

    /// Needs the permission `secretsmanager:ListSecrets`.
    async fn ping(&self, environment: &EnvironmentName) -> Result<(), StoreError> {
        self.serves(environment)?;
        self.probe().await
    }

    fn upstream(&self) -> Upstream {
        self.tally.upstream()
    }
}

fn names_of(environment: &EnvironmentName, settings: &AwsSettings) -> Result<Names, StoreError> {
    Names::parse(settings.name_template.as_deref().unwrap_or(DEFAULT_TEMPLATE), environment)
}

/// `None` outside of the years that both types know.
fn timestamp(time: Option<DateTime>) -> Option<Timestamp> {
    let time = time?;
    Timestamp::new(time.secs(), i32::try_from(time.subsec_nanos()).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use aws_sdk_secretsmanager::operation::get_secret_value::GetSecretValueError;
    use futures_util::FutureExt as _;

    use super::*;
    use crate::clock::{ManualClock, SystemClock};
    use crate::error::{Reason, Reasoned};

    fn settings(template: Option<&str>) -> AwsSettings {
        AwsSettings {
            region: Some("eu-central-1".to_owned()),
            // Nothing listens on port 9 of loopback, and nothing here gets that far.
            endpoint: Some("http://127.0.0.1:9".to_owned()),
            name_template: template.map(ToOwned::to_owned),
            ..AwsSettings::default()
        }
    }

    async fn aws(template: Option<&str>) -> Result<Aws, StoreError> {
        let credentials = Credentials::new("id", "canary-5f3a", None, None, "test");
        let environment = EnvironmentName::parse("production").unwrap();
        Aws::with_credentials(
            environment,
            &settings(template),
            credentials,
            &Bounds::default(),
            SystemClock::shared(),
        )
        .await
    }

    #[tokio::test]
    async fn another_environment_is_not_served() {
        let aws = aws(None).await.unwrap();
        let id = SecretId::parse("staging", "database").unwrap();
        let error = aws.get(&id, &Selector::CURRENT, Freshness::Cached).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
        assert!(aws.ping(&id.environment).await.is_err());
        assert!(aws.list(&id.environment, &ListRequest::default()).await.is_err());
    }

    #[tokio::test]
    async fn stores_that_share_an_account_share_its_quotas() {
        let accounts = Accounts::new(SystemClock::shared());
        let (one, other) = (aws(None).await.unwrap(), aws(Some("other/{name}")).await.unwrap());
        assert!(!Arc::ptr_eq(&one.account, &other.account));
        let (one, other) = (one.sharing(&accounts), other.sharing(&accounts));
        assert!(Arc::ptr_eq(&one.account, &other.account));
    }

    #[tokio::test]
    async fn a_call_that_would_wait_for_too_long_is_not_made_and_says_so() {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        let aws =
            Aws { account: Arc::new(Account::new(&(clock as SharedClock))), ..aws(None).await.unwrap() };
        // No token comes back, because the clock stands still.
        for _ in 0..15 {
            aws.account.admit(Operation::DeleteSecret).await.unwrap();
        }
        let mut line: Vec<_> =
            (0..125).map(|_| Box::pin(aws.account.admit(Operation::DeleteSecret))).collect();
        assert!(line.iter_mut().all(|waits| waits.as_mut().now_or_never().is_none()));
        let call = async { Ok::<(), SdkError<GetSecretValueError>>(()) };
        let failure = aws.ask(Operation::DeleteSecret, call).await.unwrap_err();
        let error = failure.of(&aws.environment);
        assert_eq!(error.reason(), Reason::StoreThrottled);
        assert!(
            error.to_string().ends_with(
                "DeleteSecret wait than the account's quota lets through in time; try again in 5040 ms"
            ),
            "{error}"
        );
        assert_eq!(
            aws.upstream(),
            Upstream { value_calls: Some(0), quota_refusals: 1, ..Upstream::default() }
        );
    }

    #[tokio::test]
    async fn an_ambiguous_template_is_refused_at_once() {
        let error = aws(Some("{environment}{name}")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
    }

    #[tokio::test]
    async fn debug_shows_no_credentials() {
        assert!(!format!("{:?}", aws(None).await.unwrap()).contains("canary"));
    }

    #[test]
    fn times_keep_their_fraction() {
        let time = timestamp(Some(DateTime::from_secs_and_nanos(1_569_534_789, 46_000_000))).unwrap();
        assert_eq!(time.as_millisecond(), 1_569_534_789_046);
        assert_eq!(timestamp(Some(DateTime::from_secs(i64::MAX))), None);
        assert_eq!(timestamp(None), None);
    }
}
