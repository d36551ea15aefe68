//! A random text: the whole value, or one member of a JSON object. Nothing but the store has to be told.

use std::ops::Range;
use std::sync::Arc;

use jiff::Timestamp;
use zeroize::Zeroizing;

use super::object::{self, CURRENT, Object, PENDING, Settings, shown, unfit};
use super::password::{self, Rules};
use super::{Entry, Rotator};
use crate::rotation::Failure;
use crate::secret::{FieldError, FieldName, SecretValue};

/// `random`: a random text.
pub const ENTRY: Entry =
    Entry { kind: "random", about: "a random text, as the whole value or as one member of it", build };

/// Its own keys, beside those of a password.
const KEYS: [&str; 2] = ["field", "replace_in"];
/// Shorter texts may stand in another one by chance.
const TELLING: usize = 8;

/// Rotates a random text.
///
/// | key | |
/// |---|---|
/// | `field` | the member of a JSON object that is rotated; without it, the whole value is |
/// | `replace_in` | other members that hold the same text, for example a `url`: there the old is replaced by the new |
/// | and those of [`Rules::from_settings`] | |
#[derive(Debug)]
struct Random {
    rules: Rules,
    field: Option<FieldName>,
    /// None of them is `field`.
    replace_in: Vec<FieldName>,
}

fn build(settings: &Settings) -> Result<Arc<dyn Rotator>, String> {
    Ok(Arc::new(Random::from_settings(settings)?))
}

impl Random {
    fn from_settings(settings: &Settings) -> Result<Self, String> {
        let known: Vec<&str> = KEYS.iter().chain(password::KEYS).copied().collect();
        object::only(settings, &known)?;
        let field = object::field(settings, "field")?;
        let replace_in = object::fields(settings, "replace_in")?.unwrap_or_default();
        if field.is_none() && !replace_in.is_empty() {
            return Err(
                "`replace_in` is for a JSON object; name the member that is rotated in `field`".to_owned()
            );
        }
        if replace_in.iter().any(|name| Some(name) == field.as_ref()) {
            return Err("`replace_in` names the same member as `field`; leave it out there".to_owned());
        }
        let of_password = settings.iter().filter(|(key, _)| !KEYS.contains(&key.as_str()));
        let of_password = of_password.map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Self { rules: Rules::from_settings(&of_password)?, field, replace_in })
    }

    fn rules(&self, refused: u32) -> Rules {
        if refused == 0 { self.rules.clone() } else { self.rules.stricter() }
    }

    /// The object with a new text in `field`, and wherever else the old one is said to be.
    fn next_object(
        &self,
        field: &FieldName,
        current: &SecretValue,
        rules: &Rules,
    ) -> Result<SecretValue, Failure> {
        let object = Object::read(CURRENT, current)?;
        let old = object.string(field)?;
        self.no_mix(&object, field, old)?;
        let new = fresh(rules, old)?;
        let mut texts = Vec::with_capacity(self.replace_in.len());
        for name in &self.replace_in {
            texts.push((name.as_str(), replaced(&object, name, old, &new)?));
        }
        let mut strings: Vec<(&str, &str)> =
            texts.iter().map(|(name, text)| (*name, text.as_str())).collect();
        strings.push((field.as_str(), new.as_str()));
        object.with(&strings)
    }

    fn check_object(
        &self,
        field: &FieldName,
        current: &SecretValue,
        pending: &SecretValue,
    ) -> Result<(), Failure> {
        let (current, pending) = (Object::read(CURRENT, current)?, Object::read(PENDING, pending)?);
        let (old, new) = (current.string(field)?, pending.string(field)?);
        is_new(old, new)?;
        pending.has_all_of(&current)?;
        self.no_mix(&pending, field, old)?;
        for name in &self.replace_in {
            if spellings(pending.string(name)?, new).is_empty() {
                return Err(unfit(format!(
                    "the member `{name}` of {PENDING} does not hold the value of `{field}`"
                )));
            }
        }
        Ok(())
    }

    /// Whether only those members hold the old text that are said to. Any other would go on holding it, beside the new.
    fn no_mix(&self, object: &Object<'_>, field: &FieldName, old: &str) -> Result<(), Failure> {
        let escaped = object::quoted(old)?;
        let escaped = escaped.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or_default();
        let others = object.others(field).filter(|(name, _)| !self.replaces(name));
        for (name, text) in others {
            if !spellings(text, old).is_empty() || (text.contains(escaped) && !escaped.is_empty()) {
                let name = shown(name);
                return Err(unfit(format!(
                    "the member {name} holds the old value of `{field}` too; name it in `replace_in`, where it is a text, \
                     so that both change together, or write a value in which it does not"
                )));
            }
        }
        Ok(())
    }

    fn replaces(&self, name: &str) -> bool {
        self.replace_in.iter().any(|replaced| replaced.as_str() == name)
    }
}

impl Rotator for Random {
    fn create(&self, current: &SecretValue, _now: Timestamp, refused: u32) -> Result<SecretValue, Failure> {
        let rules = self.rules(refused);
        match &self.field {
            None => object::value(fresh(&rules, plain(CURRENT, current)?)?),
            Some(field) => self.next_object(field, current, &rules),
        }
    }

    fn check(&self, current: &SecretValue, pending: &SecretValue) -> Result<(), Failure> {
        match &self.field {
            None => is_new(plain(CURRENT, current)?, plain(PENDING, pending)?),
            Some(field) => self.check_object(field, current, pending),
        }
    }
}

/// A value that is text as a whole. An object is not: its other members would be lost.
fn plain<'a>(which: &'static str, value: &'a SecretValue) -> Result<&'a str, Failure> {
    let text = value.expose_text().ok_or_else(|| unfit(format!("{which} is binary; write a text")))?;
    if !matches!(value.fields(), Err(FieldError::NotAnObject { .. } | FieldError::NotJson { .. })) {
        return Err(unfit(format!("{which} is a JSON object; name the member that is rotated in `field`")));
    }
    Ok(text)
}

fn is_new(old: &str, new: &str) -> Result<(), Failure> {
    if new.is_empty() {
        return Err(unfit(format!("{PENDING} holds an empty text where the new one is to be")));
    }
    if new == old {
        return Err(unfit(format!("{PENDING} holds the same text as {CURRENT} where a new one is to be")));
    }
    Ok(())
}

fn fresh(rules: &Rules, old: &str) -> Result<Zeroizing<String>, Failure> {
    let mut next = rules.generate()?;
    while next.as_str() == old {
        next = rules.generate()?;
    }
    Ok(next)
}

/// The text of another member with the new text wherever the old one is.
fn replaced(
    object: &Object<'_>,
    name: &FieldName,
    old: &str,
    new: &str,
) -> Result<Zeroizing<String>, Failure> {
    if old.chars().count() < TELLING {
        return Err(unfit(format!(
            "the old value is too short to be told from the rest of `{name}`; write one of {TELLING} characters or more \
             into both"
        )));
    }
    let text = object.string(name)?;
    let found = spellings(text, old);
    if found.is_empty() {
        return Err(unfit(format!(
            "the member `{name}` does not hold the old value; write a value in which it does"
        )));
    }
    let edits: Vec<_> = found.into_iter().map(|(place, how)| (place, how.spell(text, old, new))).collect();
    object::spliced(text, &edits)
}

/// How a text stands in another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    Verbatim,
    PercentEncoded,
}

impl Spelling {
    /// A new text, written as the old one was. Where that had nothing to encode, a URI is known by its `://`.
    fn spell(self, text: &str, old: &str, new: &str) -> Zeroizing<String> {
        let telling = !old.bytes().all(is_unreserved);
        match self {
            Self::PercentEncoded => percent_encoded(new),
            Self::Verbatim if !telling && text.contains("://") => percent_encoded(new),
            Self::Verbatim => Zeroizing::new(new.to_owned()),
        }
    }
}

/// Where a text holds another one, as it is or percent-encoded, whichever characters the encoder let be.
///
/// INVARIANT: each place begins and ends between two characters: a byte of UTF-8 that continues a character never equals
/// one that begins one.
fn spellings(text: &str, sought: &str) -> Vec<(Range<usize>, Spelling)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(rest) = text.as_bytes().get(at..).filter(|rest| !rest.is_empty() && !sought.is_empty()) {
        match spelled(rest, sought.as_bytes()) {
            Some((length, how)) => {
                found.push((at..at + length, how));
                at += length;
            }
            None => at += 1,
        }
    }
    found
}

/// How long the spelling of a text is that stands at the beginning of another one.
fn spelled(text: &[u8], sought: &[u8]) -> Option<(usize, Spelling)> {
    // A byte takes one character or three: of one length, there is nothing encoded in it.
    let encoded = decodes_to(text, sought).filter(|length| *length > sought.len());
    let verbatim = text.starts_with(sought).then_some((sought.len(), Spelling::Verbatim));
    encoded.map(|length| (length, Spelling::PercentEncoded)).or(verbatim)
}

/// How much of a text is another one, once it is decoded.
fn decodes_to(text: &[u8], sought: &[u8]) -> Option<usize> {
    let mut left = text;
    for byte in sought {
        left = match left {
            [b'%', high, low, rest @ ..] if decoded(*high, *low) == Some(*byte) => rest,
            [first, rest @ ..] if first == byte => rest,
            _ => return None,
        };
    }
    Some(text.len() - left.len())
}

fn decoded(high: u8, low: u8) -> Option<u8> {
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(high)? * 16 + digit(low)?)
}

/// A text for any part of a URI (RFC 3986, sections 2.1 and 2.3).
fn percent_encoded(text: &str) -> Zeroizing<String> {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    let digit = |four_bits: u8| DIGITS.get(usize::from(four_bits)).copied().unwrap_or_default();
    let mut encoded = Zeroizing::new(String::with_capacity(text.len() * 3));
    for byte in text.bytes() {
        if is_unreserved(byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.extend(['%', digit(byte >> 4), digit(byte & 0xf)]);
        }
    }
    encoded
}

const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::Trouble;
    use crate::secret::MAX_VALUE_BYTES;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn rotator(settings: Value) -> Random {
        Random::from_settings(settings.as_object().unwrap()).unwrap()
    }

    fn secret(text: &str) -> SecretValue {
        SecretValue::text(text.to_owned()).unwrap()
    }

    /// The next value, which the rotator itself finds fit.
    fn next(rotator: &Random, current: &str) -> Result<String, Failure> {
        let current = secret(current);
        let next = rotator.create(&current, Timestamp::UNIX_EPOCH, 0)?;
        rotator.check(&current, &next).unwrap();
        Ok(next.expose_text().unwrap().to_owned())
    }

    fn unfit_to(result: Result<impl Sized, Failure>, part: &str) {
        let failure = result.err().unwrap();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains(part), "{failure}");
        assert!(!failure.message.contains("canary"), "{failure}");
    }

    #[test]
    fn a_whole_value_is_replaced() {
        let random = rotator(json!({ "length": 24 }));
        let found = next(&random, "canary-1").unwrap();
        assert_eq!(found.len(), 24);
        assert_ne!(found, next(&random, "canary-1").unwrap());
        assert!(random.admin().is_none() && random.target().is_none() && !random.has_target());
    }

    #[test]
    fn a_member_is_replaced_and_the_rest_is_kept_to_the_byte() {
        let random = rotator(json!({ "field": "a.b" }));
        let before =
            "{ \"big\": 12345678901234567890.10,\n\t\"a.b\" : \"canary\\u002d1\" , \"n\": null, \"z\": [ ] }";
        let found = next(&random, before).unwrap();
        let new = secret(&found).field(&FieldName::parse("a.b").unwrap()).unwrap();
        let new = new.expose_text().unwrap();
        assert_eq!(new.len(), 40);
        assert_eq!(found, before.replace("canary\\u002d1", new));
    }

    #[test]
    fn values_of_another_shape_are_refused_unseen() {
        let (whole, member) = (rotator(json!({})), rotator(json!({ "field": "password" })));
        unfit_to(next(&whole, r#"{"password":"canary"}"#), "name the member that is rotated in `field`");
        unfit_to(next(&member, "canary"), "not a JSON object");
        unfit_to(next(&member, r#"{"pasword":"canary"}"#), "no member `password`");
        unfit_to(next(&member, r#"{"password":12}"#), "`password` of AWSCURRENT is not a string");
        unfit_to(next(&whole, r#"{"password":"canary","password":"canary"}"#), "is a JSON object");
        assert!(next(&whole, "{canary}").is_ok(), "a text like another");
        let binary = SecretValue::binary(b"canary".to_vec()).unwrap();
        unfit_to(whole.create(&binary, Timestamp::UNIX_EPOCH, 0), "binary");
        unfit_to(member.create(&binary, Timestamp::UNIX_EPOCH, 0), "binary");
    }

    #[test]
    fn a_member_that_would_go_on_holding_the_old_value_is_named() {
        let random = rotator(json!({ "field": "password" }));
        for (url, old) in [
            ("postgresql://app:canary-1@db/app", "canary-1"),
            ("postgresql://app:canary%2F%2b1@db/app", "canary/+1"),
            ("postgresql://app:canary%2F+1@db/app", "canary/+1"),
            ("canary-1", "canary-1"),
            ("postgresql://app:%63anary%C3%BC@db", "canaryü"),
        ] {
            let before = json!({ "password": old, "url": url }).to_string();
            unfit_to(next(&random, &before), "the member `url` holds the old value");
            let nested = json!({ "password": old, "nested": { "urls": ["x", url] } }).to_string();
            unfit_to(next(&random, &nested), "the member `nested` holds");
        }
        let quoted = json!({ "password": "canary\"1\\", "nested": ["canary\"1\\"] }).to_string();
        unfit_to(next(&random, &quoted), "the member `nested` holds");
        assert!(
            next(&random, &json!({ "password": "canary", "port": 5, "user": "canar" }).to_string()).is_ok()
        );
        assert!(
            next(&random, &json!({ "password": "", "user": "anyone" }).to_string()).is_ok(),
            "nothing is in all"
        );
    }

    #[test]
    fn where_it_is_said_to_be_it_is_replaced() {
        let settings = json!({ "field": "password", "replace_in": ["url", "dsn"], "length": 30,
            "alphabet": "abcdefghijklmnop@/:%#", "require": ["symbol"] });
        let random = rotator(settings);
        let before = json!({
            "password": "canary@/1", "port": 5432,
            "url": "redis://:canary%40%2f1@a,redis://:canary%40/1@b",
            "dsn": "host=db password=canary@/1 user=app",
        });
        let after: Value = serde_json::from_str(&next(&random, &before.to_string()).unwrap()).unwrap();
        let new = after["password"].as_str().unwrap();
        let in_url = percent_encoded(new);
        assert_ne!(*in_url, new, "a symbol is there, and is encoded");
        assert_eq!(after["url"], format!("redis://:{0}@a,redis://:{0}@b", *in_url));
        assert_eq!(after["dsn"], format!("host=db password={new} user=app"));
        assert_eq!(after["port"], 5432);
    }

    #[test]
    fn where_the_old_one_had_nothing_to_encode_a_uri_is_known() {
        let new = "a@b";
        for (text, expected) in [("redis://:canary01@a", "a%40b"), ("password=canary01", "a@b")] {
            let found = spellings(text, "canary01");
            assert_eq!(found.len(), 1);
            assert_eq!(*found[0].1.spell(text, "canary01", new), expected);
        }
        assert_eq!(
            *Spelling::Verbatim.spell("x://", "canary@1", new),
            "a@b",
            "it was not encoded before either"
        );
    }

    #[test]
    fn what_can_not_be_replaced_is_named() {
        let random = rotator(json!({ "field": "password", "replace_in": ["url"] }));
        let value = |password: &str, url: Value| json!({ "password": password, "url": url }).to_string();
        unfit_to(
            next(&random, &value("canary-1", json!("redis://other"))),
            "`url` does not hold the old value",
        );
        unfit_to(
            next(&random, &value("canary-1", json!(["canary-1"]))),
            "`url` of AWSCURRENT is not a string",
        );
        unfit_to(next(&random, &value("db", json!("redis://:db@db"))), "too short");
        unfit_to(next(&random, r#"{"password":"canary-1"}"#), "no member `url`");
    }

    #[test]
    fn a_pending_value_has_the_shape_of_the_current_one() {
        let random = rotator(json!({ "field": "password", "replace_in": ["url"] }));
        let current = secret(r#"{"password":"canary-1","url":"x://canary-1","n":1}"#);
        for (pending, part) in [
            ("canary-2", "AWSPENDING is not a JSON object"),
            (r#"{"password":"canary-1","url":"x://canary-1","n":1}"#, "the same text"),
            (r#"{"password":"","url":"x://","n":1}"#, "empty"),
            (r#"{"password":"canary-2","url":"x://canary-2"}"#, "lacks the member `n`"),
            (r#"{"password":"canary-2","url":"x://canary-1","n":1}"#, "`url` of AWSPENDING does not hold"),
            (
                r#"{"password":"canary-2","url":"x://canary-2","n":"canary-1"}"#,
                "the member `n` holds the old value",
            ),
        ] {
            unfit_to(random.check(&current, &secret(pending)), part);
        }
        let by_hand = secret(r#"{"url":"y://canary-2","password":"canary-2","n":2,"more":true}"#);
        assert!(random.check(&current, &by_hand).is_ok());
        let whole = rotator(json!({}));
        unfit_to(whole.check(&secret("canary"), &secret("canary")), "the same text");
        unfit_to(whole.check(&secret("canary"), &secret(r#"{"a":1}"#)), "AWSPENDING is a JSON object");
    }

    #[test]
    fn what_was_refused_is_followed_by_something_stricter() {
        let random = rotator(json!({ "length": 64, "classes": ["lower", "symbol"] }));
        let next = random.create(&secret("old"), Timestamp::UNIX_EPOCH, 1).unwrap();
        let next = next.expose_text().unwrap();
        assert_eq!(next.len(), 32);
        assert!(next.chars().all(|character| character.is_ascii_lowercase()));
    }

    #[test]
    fn wrong_settings_are_named() {
        for (settings, part) in [
            (json!({ "fields": "password" }), "did you mean `field`?"),
            (json!({ "lenght": 40 }), "did you mean `length`?"),
            (json!({ "field": "a b" }), "`field`: field `a b`"),
            (json!({ "replace_in": ["url"] }), "in `field`"),
            (json!({ "field": "a", "replace_in": ["a"] }), "the same member"),
            (json!({ "field": "a", "replace_in": "url" }), "list"),
            (json!({ "length": 5 }), "8 to 4096"),
        ] {
            let problem = Random::from_settings(settings.as_object().unwrap()).unwrap_err();
            assert!(problem.contains(part), "{settings}: {problem}");
        }
        assert!((ENTRY.build)(json!({ "field": "a" }).as_object().unwrap()).is_ok());
    }

    #[test]
    fn the_largest_value_is_rotated_and_a_larger_one_refused() {
        let random = rotator(json!({ "field": "a", "length": 16 }));
        let of = |size: usize, password: &str| {
            let rest = format!(r#"{{"pad":"","a":"{password}"}}"#).len();
            format!(r#"{{"pad":"{}","a":"{password}"}}"#, "x".repeat(size - rest))
        };
        let largest = of(MAX_VALUE_BYTES, "canary-canary-01");
        assert_eq!(next(&random, &largest).unwrap().len(), MAX_VALUE_BYTES);
        unfit_to(next(&random, &of(MAX_VALUE_BYTES, "canary-canary-1")), "65537 bytes");
        assert_eq!(next(&random, &of(1_000, "canary-1")).unwrap().len(), 1_008);
    }

    #[test]
    fn debug_shows_no_value() {
        let random = rotator(json!({ "field": "password" }));
        let value = secret(r#"{"password":"canary-5f3a"}"#);
        let next = random.create(&value, Timestamp::UNIX_EPOCH, 0).unwrap();
        let new = next.field(&FieldName::parse("password").unwrap()).unwrap();
        let shown = format!("{random:?} {next:?} {ENTRY:?}");
        assert!(!shown.contains("canary") && !shown.contains(new.expose_text().unwrap()), "{shown}");
    }

    proptest! {
        #[test]
        fn the_old_value_is_gone_and_the_rest_is_kept(
            old in "[ -~]{12,40}",
            rest in proptest::collection::btree_map("[a-z]{1,6}", "[ -~]{0,10}", 0..5),
            user in "[a-z]{1,8}",
        ) {
            let random = rotator(json!({ "field": "PASSWORD", "replace_in": ["URL", "TEXT"] }));
            let url = format!("redis://{user}:{}@host/0", *percent_encoded(&old));
            let mut before = json!({ "PASSWORD": old.as_str(), "URL": url, "TEXT": format!("<{old}>") });
            for (name, text) in &rest {
                before[name.as_str()] = json!(text);
            }
            let after = next(&random, &before.to_string()).unwrap();
            let after: Value = serde_json::from_str(&after).unwrap();
            let new = after["PASSWORD"].as_str().unwrap();
            prop_assert_ne!(new, old.as_str());
            prop_assert_eq!(&after["URL"], &json!(format!("redis://{user}:{new}@host/0")));
            prop_assert_eq!(&after["TEXT"], &json!(format!("<{new}>")));
            for (name, text) in &rest {
                prop_assert_eq!(&after[name.as_str()], &json!(text));
            }
            prop_assert_eq!(after.as_object().unwrap().len(), rest.len() + 3);
        }

        #[test]
        fn a_text_is_found_however_it_is_encoded(
            before in "[a-z]{0,5}", sought in ".{1,12}", after in "[A-Z]{0,5}", mask in any::<u64>(),
        ) {
            let mut written = before.clone();
            for (index, character) in sought.chars().enumerate() {
                let mut bytes = [0; 4];
                let plain = character.encode_utf8(&mut bytes);
                // A bare `%` before two digits reads as an encoding: whoever encodes at all, encodes it.
                if character == '%' || (mask >> index) & 1 == 1 {
                    plain.bytes().for_each(|byte| written.push_str(&format!("%{byte:02x}")));
                } else {
                    written.push_str(plain);
                }
            }
            written.push_str(&after);
            let found = spellings(&written, &sought);
            prop_assert!(!found.is_empty(), "{written}");
            for (place, _) in found {
                prop_assert!(written.get(place).is_some());
            }
        }

        #[test]
        fn encoding_is_undone_by_decoding(text in ".{0,30}") {
            let encoded = percent_encoded(&text);
            prop_assert!(encoded.bytes().all(|byte| is_unreserved(byte) || byte == b'%'));
            prop_assume!(!text.is_empty());
            let found = spellings(&encoded, &text);
            prop_assert_eq!(found.first().map(|(place, _)| place.clone()), Some(0..encoded.len()));
        }
    }
}
