//! The client: where credentials and region come from, how long a call may take, and where calls go.
//!
//! | what | from |
//! |---|---|
//! | endpoint, of Secrets Manager and of STS for `role_arn` | the broker's configuration alone, else the region's. `AWS_ENDPOINT_URL` and its kin are not followed: where applications are pointed at this broker by it, the broker would ask itself |
//! | region | the configuration, else `AWS_REGION`, the shared profile, the instance metadata |
//! | credentials | the default chain; with `role_arn`, what STS gives for them |
//!
//! One thing is not in this file's hands: sources within the default chain that themselves ask STS (a web identity
//! token, a profile with a role of its own) are the SDK's, follow `AWS_ENDPOINT_URL` and `AWS_ENDPOINT_URL_STS`, and
//! can't be told not to. Where one of them is used, neither variable may be set for the broker.

use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::identity::IdentityCache;
use aws_config::imds;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::sts::AssumeRoleProvider;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_secretsmanager::Client;
use aws_sdk_secretsmanager::config::retry::{RetryConfig, RetryPartition};
use aws_sdk_secretsmanager::config::timeout::TimeoutConfig;
use aws_sdk_secretsmanager::config::{Builder, Config, SharedHttpClient};
use aws_smithy_http_client::tls;

use crate::environment::AwsSettings;
use crate::secret::EnvironmentName;
use crate::store::StoreError;

/// How long the instance metadata service may take. Off EC2 its address leads nowhere, and nobody should wait for
/// that.
const METADATA_PATIENCE: Duration = Duration::from_secs(1);
/// How long all sources of credentials together may take, the assumed role included.
const CREDENTIALS_PATIENCE: Duration = Duration::from_secs(5);
/// The longest name of a role session (AWS STS, `AssumeRole`, `RoleSessionName`).
const LONGEST_SESSION_NAME: usize = 64;

/// How long a call to AWS may take and how often it is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// For a connection. Default 3 s.
    pub connect: Duration,
    /// For one attempt. Default 5 s.
    pub attempt: Duration,
    /// For all attempts and the pauses between them. Default 15 s.
    pub operation: Duration,
    /// Attempts in all; at least 1, default 3.
    pub attempts: u32,
    /// After AWS asked to slow down, the first pause is a random part of this, and each further one of twice as much;
    /// after other faults the SDK has shorter ones of its own. Default 200 ms.
    pub backoff: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            attempt: Duration::from_secs(5),
            operation: Duration::from_secs(15),
            attempts: 3,
            backoff: Duration::from_millis(200),
        }
    }
}

impl Bounds {
    fn timeouts(&self) -> TimeoutConfig {
        TimeoutConfig::builder()
            .connect_timeout(self.connect)
            .operation_attempt_timeout(self.attempt)
            .operation_timeout(self.operation)
            .build()
    }

    fn retries(&self) -> RetryConfig {
        RetryConfig::standard().with_max_attempts(self.attempts.max(1)).with_initial_backoff(self.backoff)
    }
}

/// A client with what the configuration says, and for the rest what the process finds around it.
pub(super) async fn from_surroundings(
    environment: &EnvironmentName,
    settings: &AwsSettings,
) -> Result<Client, StoreError> {
    let bounds = Bounds::default();
    let http = https();
    let surroundings = ProviderConfig::without_region()
        .with_http_client(http.clone())
        .with_behavior_version(Some(BehaviorVersion::latest()));
    let metadata = metadata(&surroundings);
    let region =
        region(settings, &surroundings, metadata.clone()).await.ok_or_else(|| no_region(environment))?;
    let credentials = DefaultCredentialsChain::builder()
        .configure(surroundings.with_region(Some(region.clone())))
        .region(region.clone())
        .imds_client(metadata)
        .build()
        .await;
    let loaded = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .region(region)
        .credentials_provider(credentials)
        .timeout_config(bounds.timeouts())
        .retry_config(bounds.retries())
        .load()
        .await;
    Ok(client(&loaded, environment, settings, &bounds).await)
}

/// A client with these credentials, or with what STS gives for them where a role is to be assumed, and nothing from
/// around the process.
pub(super) async fn with_credentials(
    environment: &EnvironmentName,
    settings: &AwsSettings,
    credentials: Credentials,
    bounds: &Bounds,
) -> Result<Client, StoreError> {
    let region = settings.region.clone().map(Region::new).ok_or_else(|| no_region(environment))?;
    let mut given = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(https())
        .region(region)
        .credentials_provider(SharedCredentialsProvider::new(credentials));
    // The SDK has its own type for the machine's clock, and gives one away with a configuration only.
    given.set_time_source(Config::builder().build().time_source());
    Ok(client(&given.build(), environment, settings, bounds).await)
}

/// Puts what the broker's configuration says on top of `base`, which says region, credentials and transport.
async fn client(
    base: &SdkConfig,
    environment: &EnvironmentName,
    settings: &AwsSettings,
    bounds: &Bounds,
) -> Client {
    let mut service = Builder::from(base)
        .identity_cache(IdentityCache::lazy().load_timeout(CREDENTIALS_PATIENCE).build())
        .timeout_config(bounds.timeouts())
        .retry_config(bounds.retries())
        // A budget of retries per environment: an outage of one account must not use up another's.
        .retry_partition(RetryPartition::custom(environment.to_string()).build());
    service.set_endpoint_url(settings.endpoint.clone());
    if let Some(role) = &settings.role_arn {
        let session: String = format!("claviger-{environment}").chars().take(LONGEST_SESSION_NAME).collect();
        let sts = for_sts(base, settings, bounds);
        let assumed = AssumeRoleProvider::builder(role).configure(&sts).session_name(session).build().await;
        service = service.credentials_provider(assumed);
    }
    Client::from_conf(service.build())
}

/// What STS is asked with.
///
/// INVARIANT: made from nothing, so that it holds only what is named here. A configuration that was loaded brings along
/// what `AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_STS` and the shared profile say, and by it a role's credentials would be
/// had from whomever they name, over plain HTTP too.
fn for_sts(base: &SdkConfig, settings: &AwsSettings, bounds: &Bounds) -> SdkConfig {
    let mut config = SdkConfig::builder();
    config
        .set_behavior_version(base.behavior_version())
        .set_http_client(base.http_client())
        .set_sleep_impl(base.sleep_impl())
        .set_time_source(base.time_source())
        .set_credentials_provider(base.credentials_provider())
        .set_region(base.region().cloned())
        .set_use_fips(base.use_fips())
        .set_use_dual_stack(base.use_dual_stack())
        .set_timeout_config(Some(bounds.timeouts()))
        .set_retry_config(Some(bounds.retries()))
        .set_endpoint_url(settings.sts_endpoint.clone());
    config.build()
}

/// TLS through rustls on ring, with the machine's roots. Also speaks plain HTTP, which the registry of environments
/// permits on loopback only.
fn https() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
        .build_https()
}

fn metadata(surroundings: &ProviderConfig) -> imds::Client {
    imds::Client::builder()
        .configure(surroundings)
        .connect_timeout(METADATA_PATIENCE)
        .read_timeout(METADATA_PATIENCE)
        .operation_attempt_timeout(METADATA_PATIENCE)
        .operation_timeout(METADATA_PATIENCE)
        .max_attempts(1)
        .build()
}

async fn region(
    settings: &AwsSettings,
    surroundings: &ProviderConfig,
    metadata: imds::Client,
) -> Option<Region> {
    if let Some(region) = &settings.region {
        return Some(Region::new(region.clone()));
    }
    let instance =
        imds::region::ImdsRegionProvider::builder().configure(surroundings).imds_client(metadata).build();
    RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::builder().configure(surroundings).build())
        .or_else(instance)
        .region()
        .await
}

fn no_region(environment: &EnvironmentName) -> StoreError {
    StoreError::Invalid(format!(
        "environments.{environment}.aws: no region; set `region` there, or AWS_REGION for the broker"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};

    fn environment() -> EnvironmentName {
        EnvironmentName::parse("production").unwrap()
    }

    fn credentials() -> Credentials {
        Credentials::new("id", "secret", None, None, "test")
    }

    #[tokio::test]
    async fn a_client_without_a_region_is_refused() {
        let error =
            with_credentials(&environment(), &AwsSettings::default(), credentials(), &Bounds::default())
                .await;
        assert_eq!(error.unwrap_err().reason(), Reason::InvalidArgument);
    }

    #[tokio::test]
    async fn the_configuration_decides_where_calls_go() {
        let settings = AwsSettings {
            region: Some("eu-central-1".to_owned()),
            endpoint: Some("http://127.0.0.1:1".to_owned()),
            ..AwsSettings::default()
        };
        let client =
            with_credentials(&environment(), &settings, credentials(), &Bounds::default()).await.unwrap();
        assert_eq!(client.config().region(), Some(&Region::new("eu-central-1")));
        let retries = client.config().retry_config().unwrap();
        assert_eq!(retries.max_attempts(), 3);
        let timeouts = client.config().timeout_config().unwrap();
        assert_eq!(timeouts.operation_timeout(), Some(Duration::from_secs(15)));
    }

    #[tokio::test]
    async fn sts_is_asked_where_the_configuration_says_and_nowhere_else() {
        let loaded = aws_config::defaults(BehaviorVersion::latest())
            .http_client(https())
            .region(Region::new("eu-central-1"))
            .credentials_provider(credentials())
            .use_fips(true)
            .endpoint_url("http://198.51.100.1")
            .load()
            .await;
        assert!(loaded.service_config().is_some(), "which is what reads AWS_ENDPOINT_URL_STS");

        let sts = for_sts(&loaded, &AwsSettings::default(), &Bounds::default());
        assert!(sts.endpoint_url().is_none() && sts.service_config().is_none());
        assert!(sts.credentials_provider().is_some() && sts.time_source().is_some());
        assert_eq!((sts.region(), sts.use_fips()), (loaded.region(), Some(true)));
        assert_eq!(sts.timeout_config().unwrap().operation_timeout(), Some(Duration::from_secs(15)));

        let endpoint = "https://sts.example.com";
        let settings = AwsSettings { sts_endpoint: Some(endpoint.to_owned()), ..AwsSettings::default() };
        assert_eq!(for_sts(&loaded, &settings, &Bounds::default()).endpoint_url(), Some(endpoint));
    }
}
