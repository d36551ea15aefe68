//! Wire messages to the house's words and back. What does not parse is a broker of another version.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use zeroize::Zeroize as _;

use super::answers::{Answer, Consumer, Description, Listed, RolledBack, Written};
use super::error::ClientError;
use crate::proto::v1;
use crate::secret::{
    ContentType, FieldName, Label, SecretId, SecretName, SecretValue, Selector, Version, VersionId,
};

type Parsed<T> = Result<T, ClientError>;

/// A value as it was received. The received buffer is wiped where nothing else holds it.
///
/// # Errors
/// Where the payload is not what its content type says.
pub fn received(payload: v1::SecretPayload) -> Result<SecretValue, ClientError> {
    let content_type = match payload.content_type() {
        v1::ContentType::Text => ContentType::Text,
        v1::ContentType::Binary => ContentType::Binary,
        v1::ContentType::Unspecified => return Err(ClientError::malformed("has a value of no known type")),
    };
    let value = SecretValue::new(payload.data.to_vec(), content_type);
    if let Ok(mut buffer) = payload.data.try_into_mut() {
        buffer.as_mut().zeroize();
    }
    value.map_err(|_| ClientError::malformed("has a value that is too large or not of its type"))
}

/// A value as it is sent: the same buffer, which is wiped with its last owner.
#[must_use]
pub fn payload(value: &SecretValue) -> v1::SecretPayload {
    let content_type = match value.content_type() {
        ContentType::Text => v1::ContentType::Text,
        ContentType::Binary => v1::ContentType::Binary,
    };
    v1::SecretPayload { data: Bytes::from_owner(Outgoing(value.clone())), content_type: content_type.into() }
}

struct Outgoing(SecretValue);

impl AsRef<[u8]> for Outgoing {
    fn as_ref(&self) -> &[u8] {
        self.0.expose()
    }
}

pub(super) fn selector(selector: &Selector) -> Option<v1::Selector> {
    use v1::selector::Selector as Wire;
    let selector = match selector {
        Selector::Label(Label::Current) => return None,
        Selector::Label(label) => Wire::Label(label.to_string()),
        Selector::Version(id) => Wire::VersionId(id.to_string()),
    };
    Some(v1::Selector { selector: Some(selector) })
}

pub(super) fn answer(secret: v1::Secret) -> Parsed<Answer> {
    let value = secret.payload.map(received).transpose()?;
    if value.is_none() && !secret.unchanged {
        return Err(ClientError::malformed("holds no value"));
    }
    let field = (!secret.field.is_empty()).then(|| FieldName::parse(&secret.field)).transpose();
    Ok(Answer {
        id: id(&secret.environment, &secret.name)?,
        field: field.map_err(|_| ClientError::malformed("names a field that can't be one"))?,
        version: parsed_version(&secret.version_id, &secret.labels, secret.created_at)?,
        value,
        age: age(secret.age),
        stale: secret.stale,
        rotating: secret.rotating,
    })
}

pub(super) fn description(found: &v1::DescribeSecretResponse) -> Parsed<Description> {
    let versions = found.versions.iter().map(|found| version(Some(found)));
    Ok(Description {
        id: id(&found.environment, &found.name)?,
        versions: versions.collect::<Result<_, _>>()?,
        created_at: time(found.created_at)?,
        changed_at: time(found.changed_at)?,
        deletion_at: optional_time(found.deletion_at)?,
    })
}

pub(super) fn listed(found: &v1::ListedSecret) -> Parsed<Listed> {
    Ok(Listed {
        name: name(&found.name)?,
        changed_at: time(found.changed_at)?,
        deletion_at: optional_time(found.deletion_at)?,
    })
}

pub(super) fn written(found: &v1::PutSecretResponse) -> Parsed<Written> {
    Ok(Written { version: version(found.version.as_ref())?, changed: found.changed })
}

pub(super) fn rolled_back(found: &v1::RollbackSecretResponse) -> Parsed<RolledBack> {
    let superseded = optional_version_id(&found.superseded_version_id)?;
    Ok(RolledBack { version: version(found.version.as_ref())?, superseded })
}

pub(super) fn consumer(found: v1::Consumer) -> Parsed<Consumer> {
    Ok(Consumer {
        version_id: optional_version_id(&found.version_id)?,
        since: optional_time(found.since)?,
        reported_at: optional_time(found.reported_at)?,
        name: found.name,
        principal: found.principal,
        current: found.current,
        watching: found.watching,
    })
}

pub(super) fn time(time: Option<prost_types::Timestamp>) -> Parsed<Timestamp> {
    optional_time(time)?.ok_or_else(|| ClientError::malformed("leaves a time out"))
}

pub(super) fn version_id(text: &str) -> Parsed<VersionId> {
    VersionId::parse(text).map_err(|_| ClientError::malformed("names a version that can't be one"))
}

fn optional_version_id(text: &str) -> Parsed<Option<VersionId>> {
    (!text.is_empty()).then(|| version_id(text)).transpose()
}

fn optional_time(time: Option<prost_types::Timestamp>) -> Parsed<Option<Timestamp>> {
    let parse = |time: prost_types::Timestamp| {
        Timestamp::new(time.seconds, time.nanos)
            .map_err(|_| ClientError::malformed("has a time out of range"))
    };
    time.map(parse).transpose()
}

fn age(age: Option<prost_types::Duration>) -> Duration {
    age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default()
}

fn id(environment: &str, name: &str) -> Parsed<SecretId> {
    SecretId::parse(environment, name).map_err(|_| ClientError::malformed("names a secret that can't be one"))
}

fn name(text: &str) -> Parsed<SecretName> {
    SecretName::parse(text).map_err(|_| ClientError::malformed("names a secret that can't be one"))
}

fn version(found: Option<&v1::Version>) -> Parsed<Version> {
    let found = found.ok_or_else(|| ClientError::malformed("leaves the version out"))?;
    parsed_version(&found.version_id, &found.labels, found.created_at)
}

fn parsed_version(id: &str, labels: &[String], at: Option<prost_types::Timestamp>) -> Parsed<Version> {
    let labels: Result<_, _> = labels.iter().map(|label| Label::parse(label)).collect();
    Ok(Version {
        id: version_id(id)?,
        labels: labels.map_err(|_| ClientError::malformed("names a label that can't be one"))?,
        created_at: time(at)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[test]
    fn values_come_as_they_went() {
        for value in
            [SecretValue::text("é\n".to_owned()).unwrap(), SecretValue::binary(vec![0, 255]).unwrap()]
        {
            assert!(received(payload(&value)).unwrap().same_as(&value));
        }
        let untyped = v1::SecretPayload { data: Bytes::from_static(b"canary"), content_type: 9 };
        let error = received(untyped).unwrap_err();
        assert_eq!(error.reason, Reason::Internal);
        let not_text = v1::SecretPayload { data: Bytes::from_static(&[0xff]), content_type: 1 };
        assert!(!received(not_text).unwrap_err().message.contains("255"));
    }

    fn secret() -> v1::Secret {
        v1::Secret {
            environment: "production".to_owned(),
            name: "database".to_owned(),
            version_id: "a".repeat(32),
            labels: vec!["AWSCURRENT".to_owned()],
            created_at: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            payload: Some(payload(&SecretValue::text("canary".to_owned()).unwrap())),
            age: Some(prost_types::Duration { seconds: 3, nanos: 0 }),
            ..v1::Secret::default()
        }
    }

    #[test]
    fn an_answer_is_in_our_own_words() {
        let found = answer(secret()).unwrap();
        assert_eq!(found.id.to_string(), "production:database");
        assert_eq!(found.version.labels, [Label::Current]);
        assert_eq!((found.field.is_none(), found.age), (true, Duration::from_secs(3)));
        assert!(!format!("{found:?}").contains("canary"));
        let unchanged = v1::Secret { payload: None, unchanged: true, ..secret() };
        assert!(answer(unchanged).unwrap().value.is_none());
    }

    #[test]
    fn what_no_broker_of_this_version_says_is_refused() {
        for bad in [
            v1::Secret { payload: None, ..secret() },
            v1::Secret { environment: "Prod".to_owned(), ..secret() },
            v1::Secret { version_id: "short".to_owned(), ..secret() },
            v1::Secret { created_at: None, ..secret() },
            v1::Secret {
                created_at: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
                ..secret()
            },
            v1::Secret { labels: vec!["AWSX".to_owned()], ..secret() },
            v1::Secret { field: "a b".to_owned(), ..secret() },
        ] {
            let error = answer(bad).unwrap_err();
            assert_eq!(error.reason, Reason::Internal);
            assert!(error.message.contains("another version"), "{error}");
        }
    }

    #[test]
    fn the_current_version_needs_no_selector() {
        assert_eq!(selector(&Selector::CURRENT), None);
        let label = Selector::Label(Label::Previous);
        let wire = v1::selector::Selector::Label("AWSPREVIOUS".to_owned());
        assert_eq!(selector(&label).unwrap().selector, Some(wire));
    }
}
