//! Wire messages to the house's words and back. Parsed once here; inside, no string is checked again.

use jiff::Timestamp;
use prost_types::{Duration as ProtoDuration, Timestamp as ProtoTimestamp};

use super::rejected;
use crate::broker::{BrokerError, Disclosed, Read};
use crate::error::Reason;
use crate::policy::{Effect, Resource};
use crate::proto::v1;
use crate::secret::{
    ContentType, EnvironmentName, FieldName, Label, SecretId, SecretName, SecretValue, Selector, Version,
    VersionId,
};
use crate::store::{Freshness, Source};

type Parsed<T> = Result<T, BrokerError>;

pub(super) fn invalid(message: impl Into<String>) -> BrokerError {
    BrokerError::Rejected { reason: Reason::InvalidArgument, message: message.into() }
}

pub(super) fn environment(text: &str) -> Parsed<EnvironmentName> {
    EnvironmentName::parse(text).map_err(|error| rejected(&error))
}

pub(super) fn secret_id(environment: &str, name: &str) -> Parsed<SecretId> {
    SecretId::parse(environment, name).map_err(|error| rejected(&error))
}

pub(super) fn version_id(text: &str) -> Parsed<VersionId> {
    VersionId::parse(text).map_err(|error| rejected(&error))
}

/// An empty string says nothing.
pub(super) fn optional_version_id(text: &str) -> Parsed<Option<VersionId>> {
    (!text.is_empty()).then(|| version_id(text)).transpose()
}

pub(super) fn label(text: &str) -> Parsed<Label> {
    Label::parse(text).map_err(|error| rejected(&error))
}

pub(super) fn selector(selector: Option<&v1::Selector>) -> Parsed<Selector> {
    match selector.and_then(|selector| selector.selector.as_ref()) {
        None => Ok(Selector::CURRENT),
        Some(v1::selector::Selector::VersionId(id)) => Ok(Selector::Version(version_id(id)?)),
        Some(v1::selector::Selector::Label(text)) => Ok(Selector::Label(label(text)?)),
    }
}

pub(super) fn read(query: v1::SecretQuery) -> Parsed<Read> {
    let v1::SecretQuery { environment, name, field, selector, if_version_id } = query;
    asked(&environment, &name, &field, selector.as_ref(), &if_version_id)
}

/// What is asked of one secret.
pub(super) fn asked(
    environment: &str,
    name: &str,
    field: &str,
    of: Option<&v1::Selector>,
    if_version_id: &str,
) -> Parsed<Read> {
    let field = (!field.is_empty()).then(|| FieldName::parse(field)).transpose();
    Ok(Read {
        id: secret_id(environment, name)?,
        field: field.map_err(|error| rejected(&error))?,
        selector: selector(of)?,
        if_version_id: optional_version_id(if_version_id)?,
    })
}

pub(super) const fn freshness(refresh: bool) -> Freshness {
    if refresh { Freshness::Refresh } else { Freshness::Cached }
}

/// The resource that an environment and a name mean: nothing is the broker, no name is the environment.
pub(super) fn resource(environment_name: &str, name: &str) -> Parsed<Resource> {
    match (environment_name, name) {
        ("", "") => Ok(Resource::Broker),
        (text, "") => Ok(Resource::Environment(environment(text)?)),
        (text, name) => Ok(Resource::Secret(secret_id(text, name)?)),
    }
}

/// Checks the bound that records have too: a reason that does not fit is refused, not cut.
pub(super) fn reason(text: &str) -> Parsed<&str> {
    const MOST: usize = 512;
    if text.len() > MOST {
        return Err(invalid(format!("reason: {} bytes given; at most {MOST} are permitted", text.len())));
    }
    Ok(text)
}

/// Approvals are not there yet; to take an id and ignore it would be to pretend.
pub(super) fn no_approval(approval_id: &str) -> Parsed<()> {
    if approval_id.is_empty() {
        return Ok(());
    }
    let message = "approval_id: this broker keeps no approvals; leave it empty".to_owned();
    Err(BrokerError::Rejected { reason: Reason::Unsupported, message })
}

pub(super) fn payload(payload: Option<v1::SecretPayload>) -> Parsed<SecretValue> {
    let payload = payload.ok_or_else(|| invalid("payload: is missing"))?;
    let bytes = payload.data.to_vec();
    let value = match payload.content_type() {
        v1::ContentType::Text => SecretValue::new(bytes, ContentType::Text),
        v1::ContentType::Binary => SecretValue::new(bytes, ContentType::Binary),
        v1::ContentType::Unspecified => {
            return Err(invalid("payload.content_type: must be CONTENT_TYPE_TEXT or CONTENT_TYPE_BINARY"));
        }
    };
    value.map_err(|error| rejected(&error))
}

/// The bytes of a value on their way out: shared with the cache, wiped with the last owner.
struct Outgoing(SecretValue);

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        self.0.expose()
    }
}

pub(super) fn secret(disclosed: Disclosed) -> v1::Secret {
    let payload = disclosed.value.map(|value| v1::SecretPayload {
        content_type: match value.content_type() {
            ContentType::Text => v1::ContentType::Text,
            ContentType::Binary => v1::ContentType::Binary,
        }
        .into(),
        data: bytes::Bytes::from_owner(Outgoing(value)),
    });
    v1::Secret {
        environment: disclosed.id.environment.to_string(),
        name: disclosed.id.name.to_string(),
        field: disclosed.field.map(|field| field.to_string()).unwrap_or_default(),
        version_id: disclosed.version.id.to_string(),
        labels: labels(&disclosed.version.labels),
        created_at: Some(timestamp(disclosed.version.created_at)),
        unchanged: payload.is_none(),
        payload,
        age: Some(duration(disclosed.age)),
        source: match disclosed.source {
            Source::Store => v1::Source::Store,
            Source::Cache => v1::Source::Cache,
        }
        .into(),
        stale: disclosed.stale,
        rotating: false,
    }
}

pub(super) fn version(version: &Version) -> v1::Version {
    v1::Version {
        version_id: version.id.to_string(),
        labels: labels(&version.labels),
        created_at: Some(timestamp(version.created_at)),
    }
}

fn labels(labels: &[Label]) -> Vec<String> {
    labels.iter().map(ToString::to_string).collect()
}

pub(super) fn name(name: &SecretName) -> String {
    name.to_string()
}

pub(super) fn timestamp(time: Timestamp) -> ProtoTimestamp {
    ProtoTimestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }
}

pub(super) fn time(field: &str, time: Option<ProtoTimestamp>) -> Parsed<Option<Timestamp>> {
    let parse = |time: ProtoTimestamp| {
        Timestamp::new(time.seconds, time.nanos).map_err(|_| invalid(format!("{field}: is out of range")))
    };
    time.map(parse).transpose()
}

pub(super) fn duration(duration: std::time::Duration) -> ProtoDuration {
    ProtoDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

pub(super) fn span(field: &str, duration: Option<ProtoDuration>) -> Parsed<std::time::Duration> {
    let duration = duration.ok_or_else(|| invalid(format!("{field}: is missing")))?;
    std::time::Duration::try_from(duration)
        .map_err(|_| invalid(format!("{field}: is negative or out of range")))
}

/// The effect on the wire, with the number of approvals that it takes.
pub(super) fn effect(effect: Effect) -> (i32, i32) {
    match effect {
        Effect::Allow => (v1::Effect::Allow.into(), 0),
        Effect::Deny => (v1::Effect::Deny.into(), 0),
        Effect::ApprovalRequired(approvals) => (v1::Effect::ApprovalRequired.into(), i32::from(approvals)),
    }
}
