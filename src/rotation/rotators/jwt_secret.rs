//! The secrets that tokens are signed with: 64 random bytes each, as hexadecimal digits.

use std::collections::BTreeSet;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use zeroize::Zeroizing;

use super::object::{self, CURRENT, Object, PENDING, Settings, unfit};
use super::{Entry, Rotator, password};
use crate::rotation::Failure;
use crate::secret::{FieldName, SecretValue};

/// `jwt-secret`: what tokens are signed with.
pub const ENTRY: Entry = Entry {
    kind: "jwt-secret",
    about: "64 random bytes as hex, for each secret that tokens are signed with",
    build,
};

const KEYS: &[&str] = &["fields", "updated_at"];
const DEFAULT_FIELDS: [&str; 2] = ["secret", "refresh_secret"];
const DEFAULT_UPDATED_AT: &str = "updatedAt";
/// As many as the largest of the hashes that sign (RFC 7518, section 3.2, asks for no fewer).
const BYTES: usize = 64;
/// The shortest text that is taken for a secret which someone else made: the output of the smallest of these hashes.
const SHORTEST: usize = 32;

/// Rotates the secrets that tokens are signed with.
///
/// | key | |
/// |---|---|
/// | `fields` | the members that hold one each; default `["secret", "refresh_secret"]` |
/// | `updated_at` | the member that says since when, in UTC; default `updatedAt` |
#[derive(Debug)]
struct JwtSecret {
    /// At least one, each once.
    fields: Vec<FieldName>,
    /// None of `fields`.
    updated_at: FieldName,
}

fn build(settings: &Settings) -> Result<Arc<dyn Rotator>, String> {
    Ok(Arc::new(JwtSecret::from_settings(settings)?))
}

impl JwtSecret {
    fn from_settings(settings: &Settings) -> Result<Self, String> {
        object::only(settings, KEYS)?;
        let by_default = |name: &str| FieldName::parse(name).map_err(|error| error.to_string());
        let fields = match object::fields(settings, "fields")? {
            Some(fields) => fields,
            None => DEFAULT_FIELDS.into_iter().map(by_default).collect::<Result<_, _>>()?,
        };
        let updated_at = match object::field(settings, "updated_at")? {
            Some(name) => name,
            None => by_default(DEFAULT_UPDATED_AT)?,
        };
        if fields.is_empty() {
            return Err("`fields` names none; name at least one, or leave it out".to_owned());
        }
        if fields.contains(&updated_at) {
            return Err(format!("`updated_at` names `{updated_at}`, one of `fields`; name another member"));
        }
        Ok(Self { fields, updated_at })
    }
}

impl Rotator for JwtSecret {
    fn create(&self, current: &SecretValue, now: Timestamp, _refused: u32) -> Result<SecretValue, Failure> {
        let object = Object::read(CURRENT, current)?;
        let mut secrets = Vec::with_capacity(self.fields.len());
        for field in &self.fields {
            // One that is not there may be written otherwise there: the one in use would stay.
            object.string(field)?;
            secrets.push((field.as_str(), fresh()?));
        }
        let now = format!("{now:.3}");
        let mut strings: Vec<(&str, &str)> =
            secrets.iter().map(|(name, secret)| (*name, secret.as_str())).collect();
        strings.push((self.updated_at.as_str(), now.as_str()));
        object.with(&strings)
    }

    fn check(&self, current: &SecretValue, pending: &SecretValue) -> Result<(), Failure> {
        let (current, pending) = (Object::read(CURRENT, current)?, Object::read(PENDING, pending)?);
        pending.has_all_of(&current)?;
        let mut known = BTreeSet::new();
        for field in &self.fields {
            known.insert(current.string(field)?);
        }
        for field in &self.fields {
            let secret = pending.string(field)?;
            if secret.len() < SHORTEST {
                return Err(unfit(format!(
                    "the member `{field}` of {PENDING} has fewer than {SHORTEST} characters"
                )));
            }
            if !known.insert(secret) {
                return Err(unfit(format!(
                    "the member `{field}` of {PENDING} holds no new secret, or another's"
                )));
            }
        }
        Ok(())
    }
}

/// Drawn for each member by itself, so that no two are the same.
fn fresh() -> Result<Zeroizing<String>, Failure> {
    let mut bytes = Zeroizing::new([0_u8; BYTES]);
    password::random(bytes.as_mut_slice())?;
    Ok(Zeroizing::new(HEXLOWER.encode(bytes.as_slice())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::Trouble;
    use crate::secret::MAX_VALUE_BYTES;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn rotator(settings: Value) -> JwtSecret {
        JwtSecret::from_settings(settings.as_object().unwrap()).unwrap()
    }

    fn secret(text: impl ToString) -> SecretValue {
        SecretValue::text(text.to_string()).unwrap()
    }

    fn noon() -> Timestamp {
        "2026-02-03T12:00:00.1239Z".parse().unwrap()
    }

    /// The next value, which the rotator itself finds fit.
    fn next(rotator: &JwtSecret, current: impl ToString) -> Result<Value, Failure> {
        let current = secret(current);
        let next = rotator.create(&current, noon(), 0)?;
        rotator.check(&current, &next).unwrap();
        Ok(serde_json::from_slice(next.expose()).unwrap())
    }

    fn unfit_to(result: Result<impl Sized, Failure>, part: &str) {
        let failure = result.err().unwrap();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains(part), "{failure}");
        assert!(!failure.message.contains("canary"), "{failure}");
    }

    fn is_secret(value: &Value) -> bool {
        let text = value.as_str().unwrap();
        text.len() == 128 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }

    #[test]
    fn both_secrets_of_the_samples_are_replaced() {
        let random = rotator(json!({}));
        let before = json!({ "secret": "canary-1", "refresh_secret": "canary-2", "issuer": "shop" });
        let after = next(&random, &before).unwrap();
        assert!(is_secret(&after["secret"]) && is_secret(&after["refresh_secret"]));
        assert_ne!(after["secret"], after["refresh_secret"]);
        assert_eq!(after["updatedAt"], "2026-02-03T12:00:00.123Z");
        assert_eq!(after["issuer"], "shop");
        assert_eq!(after.as_object().unwrap().len(), 4);
        let again = next(&random, &after).unwrap();
        assert_ne!(again["secret"], after["secret"]);
        assert!(!random.has_target() && random.admin().is_none());
    }

    #[test]
    fn whole_seconds_have_their_milliseconds_too() {
        let current = secret(json!({ "k": "canary", "at": "then" }));
        let midnight = "2026-02-03T00:00:00Z".parse().unwrap();
        let next =
            rotator(json!({ "fields": ["k"], "updated_at": "at" })).create(&current, midnight, 0).unwrap();
        let next: Value = serde_json::from_slice(next.expose()).unwrap();
        assert_eq!(next["at"], "2026-02-03T00:00:00.000Z");
    }

    #[test]
    fn the_rest_is_kept_to_the_byte() {
        let random = rotator(json!({ "fields": ["k"], "updated_at": "at" }));
        let current = secret("{\n  \"at\" : \"\", \"n\": 1.10,\"k\":\"canary\"\n}\n");
        let next = random.create(&current, noon(), 0).unwrap();
        let new = next.field(&FieldName::parse("k").unwrap()).unwrap();
        let new = new.expose_text().unwrap();
        let expected =
            format!("{{\n  \"at\" : \"2026-02-03T12:00:00.123Z\", \"n\": 1.10,\"k\":\"{new}\"\n}}\n");
        assert_eq!(next.expose_text().unwrap(), expected);
    }

    #[test]
    fn values_of_another_shape_are_refused_unseen() {
        let random = rotator(json!({}));
        unfit_to(next(&random, "canary"), "not a JSON object");
        unfit_to(next(&random, r#"["canary"]"#), "not a JSON object");
        unfit_to(next(&random, json!({ "secret": "canary" })), "no member `refresh_secret`");
        unfit_to(next(&random, json!({ "secret": "canary", "refresh_secret": 5 })), "is not a string");
        let binary = SecretValue::binary(b"canary".to_vec()).unwrap();
        unfit_to(random.create(&binary, noon(), 0), "binary");
    }

    #[test]
    fn a_pending_value_has_new_secrets() {
        let random = rotator(json!({}));
        let long = |digit: &str| digit.repeat(64);
        let current = secret(json!({ "secret": long("1"), "refresh_secret": long("2"), "n": 1 }));
        for (pending, part) in [
            (json!("canary"), "AWSPENDING is not a JSON object"),
            (json!({ "secret": long("3"), "refresh_secret": long("4") }), "lacks the member `n`"),
            (json!({ "secret": long("3"), "refresh_secret": long("3"), "n": 1 }), "`refresh_secret`"),
            (json!({ "secret": long("1"), "refresh_secret": long("4"), "n": 1 }), "`secret`"),
            (json!({ "secret": long("2"), "refresh_secret": long("1"), "n": 1 }), "`secret`"),
            (json!({ "secret": "canary", "refresh_secret": long("4"), "n": 1 }), "fewer than 32"),
            (json!({ "secret": null, "refresh_secret": long("4"), "n": 1 }), "not a string"),
        ] {
            unfit_to(random.check(&current, &secret(pending)), part);
        }
        let by_hand = secret(json!({ "secret": long("3"), "refresh_secret": long("4"), "n": 2 }));
        assert!(random.check(&current, &by_hand).is_ok());
    }

    #[test]
    fn wrong_settings_are_named() {
        for (settings, part) in [
            (json!({ "field": ["secret"] }), "did you mean `fields`?"),
            (json!({ "fields": [] }), "names none"),
            (json!({ "fields": ["a", "a"] }), "twice"),
            (json!({ "fields": "secret" }), "list"),
            (json!({ "fields": ["a b"] }), "`fields`: field `a b`"),
            (json!({ "fields": ["a"], "updated_at": "a" }), "one of `fields`"),
            (json!({ "updated_at": 5 }), "`updated_at` is not a text"),
        ] {
            let problem = JwtSecret::from_settings(settings.as_object().unwrap()).unwrap_err();
            assert!(problem.contains(part), "{settings}: {problem}");
        }
        assert!((ENTRY.build)(json!({}).as_object().unwrap()).is_ok());
    }

    #[test]
    fn what_does_not_fit_any_more_is_refused() {
        let random = rotator(json!({ "fields": ["k"] }));
        let rest = json!({ "pad": "", "k": "x", "updatedAt": "" }).to_string().len();
        let grown = 127 + "2026-02-03T12:00:00.123Z".len();
        let of = |pad: usize| json!({ "pad": "x".repeat(pad), "k": "x", "updatedAt": "" });
        let most = MAX_VALUE_BYTES - rest - grown;
        assert_eq!(random.create(&secret(of(most)), noon(), 0).unwrap().len(), MAX_VALUE_BYTES);
        unfit_to(next(&random, of(most + 1)), "65537 bytes");
    }

    #[test]
    fn debug_shows_no_value() {
        let random = rotator(json!({ "fields": ["k"] }));
        let next = random.create(&secret(json!({ "k": "canary" })), noon(), 0).unwrap();
        assert_eq!(format!("{next:?}"), "SecretValue([redacted], text)");
        assert!(!format!("{random:?} {ENTRY:?}").contains("canary"));
    }

    proptest! {
        #[test]
        fn as_many_secrets_as_fields_and_nothing_else_changed(
            names in proptest::collection::btree_set("[a-z]{1,6}", 1..6),
            rest in proptest::collection::btree_map("[A-Z]{1,6}", ".{0,20}", 0..5),
        ) {
            let random = rotator(json!({ "fields": names }));
            let mut before = json!({});
            for name in &names {
                before[name.as_str()] = json!("canary");
            }
            for (name, text) in &rest {
                before[name.as_str()] = json!(text);
            }
            let after = next(&random, &before).unwrap();
            let secrets: BTreeSet<&str> = names.iter().map(|name| after[name.as_str()].as_str().unwrap()).collect();
            prop_assert_eq!(secrets.len(), names.len());
            prop_assert!(names.iter().all(|name| is_secret(&after[name.as_str()])));
            for (name, text) in &rest {
                prop_assert_eq!(&after[name.as_str()], &json!(text));
            }
            prop_assert_eq!(after.as_object().unwrap().len(), names.len() + rest.len() + 1);
        }
    }
}
