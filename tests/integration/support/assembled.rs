//! A broker put together in this process, for tests that look inside or turn its clock.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use claviger::broker::{Call, Disclosed, Read};
use claviger::clock::{ManualClock, SharedClock};
use claviger::config::assembly::{Running, StartError};
use claviger::config::{Resolved, RootKeyChoice};
use claviger::environment::{Environment, Registry};
use claviger::identity::{Principal, PrincipalKind, Proof, SourceAddress};
use claviger::policy::PolicySource;
use claviger::secret::{SecretId, SecretValue, Selector, VersionId};
use claviger::store::{Freshness, Put, Written};

pub type BrokerResult<T> = Result<T, claviger::broker::BrokerError>;

/// A configuration of three environments on the sealed store below `folder`, with the shipped policies.
pub fn resolved(folder: &Path) -> Resolved {
    let environments = ["development", "staging", "production"].map(|name| {
        let mut environment = Environment::sealed(name.parse().unwrap());
        environment.protected = name == "production";
        environment
    });
    let root_key = RootKeyChoice::File(folder.join("root.key"));
    let registry = Registry::new(environments).unwrap();
    Resolved {
        instance: "test".to_owned(),
        cache_bytes: 1024 * 1024,
        ..Resolved::new(folder.join("data"), root_key, PolicySource::shipped(), registry)
    }
}

pub fn clock() -> Arc<ManualClock> {
    ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap())
}

pub async fn start(resolved: &Resolved, clock: SharedClock) -> Result<Running, StartError> {
    Running::start(resolved, &|_| None, clock).await
}

/// A person in these groups.
pub fn person(id: &str, groups: &[&str]) -> Call {
    by(PrincipalKind::User, id, groups)
}

/// A program in these groups.
pub fn program(id: &str, groups: &[&str]) -> Call {
    by(PrincipalKind::Workload, id, groups)
}

fn by(kind: PrincipalKind, id: &str, groups: &[&str]) -> Call {
    let groups: BTreeSet<_> = groups.iter().map(ToString::to_string).collect();
    let proof = Proof { method: "token", detail: "test".to_owned() };
    Call {
        principal: Arc::new(Principal::new(kind, id, groups, BTreeMap::new(), proof)),
        source_address: SourceAddress::Unix { pid: Some(1) },
        request_id: VersionId::generate().to_string().into(),
        reason: None,
    }
}

pub fn administrator() -> Call {
    person("root", &["administrators"])
}

pub fn id(environment: &str, name: &str) -> SecretId {
    SecretId::parse(environment, name).unwrap()
}

pub async fn put(running: &Running, id: SecretId, value: &str) -> BrokerResult<Written> {
    let value = SecretValue::text(value.to_owned()).unwrap();
    let put = Put { value, token: VersionId::generate(), labels: Vec::new(), expected: None };
    running.broker.put(&administrator(), id, put, false).await
}

pub async fn get(running: &Running, call: &Call, id: SecretId) -> BrokerResult<Disclosed> {
    let read = Read { id, field: None, selector: Selector::CURRENT, if_version_id: None };
    running.broker.get(call, read, Freshness::Cached).await
}

/// Every line of the audit log below `folder`, oldest first, as JSON.
pub fn records(folder: &Path) -> Vec<serde_json::Value> {
    let mut files: Vec<_> = std::fs::read_dir(folder.join("data/audit/test"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .collect();
    files.sort();
    files
        .iter()
        .flat_map(|file| {
            std::fs::read_to_string(file).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .map(|line| serde_json::from_str(&line).unwrap())
        .collect()
}
