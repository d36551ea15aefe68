//! The sample environments and secrets of a throw-away broker. Every password and key in them is random, made anew
//! for each broker, so that nothing of a sample can end up in use elsewhere.

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use serde_json::json;

use crate::broker::{Broker, BrokerError, Call};
use crate::crypto::random;
use crate::environment::{Environment, EnvironmentError, Registry};
use crate::error::{Reason, Reasoned as _};
use crate::identity::Principal;
use crate::rotation::service::Rotations;
use crate::secret::{SecretId, SecretValue, VersionId};
use crate::store::Put;

/// `development`, `staging` and a protected `production`.
///
/// # Errors
/// None, as long as the three names stay names.
pub fn registry() -> Result<Registry, EnvironmentError> {
    let environments = ["development", "staging", "production"].into_iter().filter_map(|name| {
        let mut environment = Environment::sealed(name.parse().ok()?);
        environment.protected = name == "production";
        Some(environment)
    });
    Registry::new(environments)
}

/// Writes the samples that are not there yet, through the same broker and policies as everyone.
///
/// # Errors
/// [`BrokerError`].
pub async fn seed(broker: &Broker) -> Result<(), BrokerError> {
    let seeder = Principal::internal("claviger-dev", ["administrators"]);
    for environment in broker.registry().iter() {
        for (name, value) in samples(environment.name.as_str())? {
            let call = Call::internal(seeder.clone(), "sample secrets of claviger dev");
            let id = SecretId::parse(environment.name.as_str(), name).map_err(internal)?;
            let value = SecretValue::text(value.to_string()).map_err(internal)?;
            let put = Put { value, token: VersionId::generate(), labels: Vec::new(), expected: Some(None) };
            match broker.put(&call, id, put, false).await {
                // Changed or deleted by whoever keeps this broker: theirs to decide.
                Err(error) if matches!(error.reason(), Reason::Conflict | Reason::SecretDeleted) => {}
                other => drop(other?),
            }
        }
    }
    Ok(())
}

/// Sets the rotations of the samples that have none yet, so that `claviger rotate jwt` works at once.
///
/// # Errors
/// [`BrokerError`].
pub async fn seed_rotations(rotations: &Rotations, broker: &Broker) -> Result<(), BrokerError> {
    let seeder = Principal::internal("claviger-dev", ["administrators"]);
    let call = Call::internal(seeder, "sample rotations of claviger dev");
    for environment in broker.registry().iter() {
        let id = SecretId::parse(environment.name.as_str(), "jwt").map_err(internal)?;
        match rotations.get(&call, id.clone()).await {
            Err(error) if error.reason() == Reason::RotationNotFound => {}
            // Changed by whoever keeps this broker: theirs to decide.
            other => {
                drop(other?);
                continue;
            }
        }
        match rotations.set(&call, id, JWT_ROTATION).await {
            Err(error) if matches!(error.reason(), Reason::SecretDeleted | Reason::SecretNotFound) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

const JWT_ROTATION: &str = "rotator = \"jwt-secret\"\nschedule = \"signing-key\"\n";

fn samples(environment: &str) -> Result<[(&'static str, serde_json::Value); 4], BrokerError> {
    let host = |service: &str| match environment {
        "development" => "localhost".to_owned(),
        other => format!("{service}.{other}.internal"),
    };
    Ok([
        (
            "database",
            json!({
                "engine": "postgres",
                "host": host("database"),
                "port": 5432,
                "username": "app",
                "password": password()?,
                "dbname": format!("app_{environment}"),
            }),
        ),
        ("redis", json!({ "host": host("redis"), "port": 6379, "password": password()? })),
        ("jwt", json!({ "secret": signing_key()?, "refresh_secret": signing_key()? })),
        ("api-keys", json!({ "market_data": password()?, "news": password()?, "email": password()? })),
    ])
}

/// 32 URL-safe characters: 192 random bits.
fn password() -> Result<String, BrokerError> {
    Ok(BASE64URL_NOPAD.encode(&random::<24>().map_err(internal)?))
}

/// 64 random bytes as hex.
fn signing_key() -> Result<String, BrokerError> {
    Ok(HEXLOWER.encode(&random::<64>().map_err(internal)?))
}

fn internal(error: impl std::fmt::Display) -> BrokerError {
    BrokerError::Rejected { reason: Reason::Internal, message: error.to_string() }
}
