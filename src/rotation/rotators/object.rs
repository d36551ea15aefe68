//! JSON objects: a definition's settings, read strictly, and a secret's value, changed in place.
//!
//! ```text
//! { "host": "db",  "password": "old", "port": 5432 }
//!                              ─────
//! ```
//! Of a value, only the text of a member is replaced. The order of the others, their spaces, escapes and numbers
//! (`1e400`, `1.10`) stay as they were written, and none of them is copied into memory that nobody wipes.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::value::RawValue;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use crate::rotation::{Failure, Trouble};
use crate::secret::{FieldError, FieldName, SecretValue};

/// How errors call the value that is current.
pub(super) const CURRENT: &str = "AWSCURRENT";
/// How errors call the value that is to follow.
pub(super) const PENDING: &str = "AWSPENDING";

/// A rotator's table in a definition.
pub(super) type Settings = Map<String, Value>;

/// Refuses a key that is not known, naming the nearest that is.
///
/// # Errors
/// A line that names the key.
pub(super) fn only(settings: &Settings, known: &[&str]) -> Result<(), String> {
    let Some(unknown) = settings.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
    let nearest = known.iter().min_by_key(|known| strsim::damerau_levenshtein(known, unknown));
    let unknown = shown(unknown);
    Err(match nearest {
        Some(nearest) => format!("unknown key {unknown}; did you mean `{nearest}`?"),
        None => format!("unknown key {unknown}; this table has none"),
    })
}

/// A text.
///
/// # Errors
/// A line that names the key, where it is something else.
pub(super) fn text<'a>(settings: &'a Settings, key: &str) -> Result<Option<&'a str>, String> {
    settings.get(key).map(|value| value.as_str().ok_or_else(|| not_text(key))).transpose()
}

/// A list of texts, none of them twice.
///
/// # Errors
/// A line that names the key.
pub(super) fn texts<'a>(settings: &'a Settings, key: &str) -> Result<Option<Vec<&'a str>>, String> {
    let Some(value) = settings.get(key) else { return Ok(None) };
    let list = value.as_array().ok_or_else(|| format!("`{key}` is a list of texts: [\"…\", \"…\"]"))?;
    let mut found = Vec::with_capacity(list.len());
    for value in list {
        let text = value.as_str().ok_or_else(|| not_text(key))?;
        if found.contains(&text) {
            return Err(format!("`{key}` names {} twice; once is enough", shown(text)));
        }
        found.push(text);
    }
    Ok(Some(found))
}

/// The name of a member.
///
/// # Errors
/// A line that names the key.
pub(super) fn field(settings: &Settings, key: &str) -> Result<Option<FieldName>, String> {
    text(settings, key)?.map(|name| parse_field(key, name)).transpose()
}

/// The names of members, none of them twice.
///
/// # Errors
/// A line that names the key.
pub(super) fn fields(settings: &Settings, key: &str) -> Result<Option<Vec<FieldName>>, String> {
    let Some(names) = texts(settings, key)? else { return Ok(None) };
    names.into_iter().map(|name| parse_field(key, name)).collect::<Result<_, _>>().map(Some)
}

fn parse_field(key: &str, name: &str) -> Result<FieldName, String> {
    FieldName::parse(name).map_err(|error| format!("`{key}`: {error}"))
}

fn not_text(key: &str) -> String {
    format!("`{key}` is not a text; write it in quotes")
}

/// A value that is a JSON object.
pub(super) struct Object<'a> {
    which: &'static str,
    text: &'a str,
    /// Where in `text` each member's own text is.
    places: BTreeMap<String, Range<usize>>,
    /// What each member holds; one that is `null` holds nothing.
    held: BTreeMap<String, SecretValue>,
}

impl<'a> Object<'a> {
    /// Reads a value, which errors call `which`.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`] where it is no JSON object, or one of whose members something can't be known.
    pub(super) fn read(which: &'static str, value: &'a SecretValue) -> Result<Self, Failure> {
        let mut held = BTreeMap::new();
        for (name, member) in value.fields().map_err(|error| not_an_object(which, &error))? {
            match member {
                Ok(member) => drop(held.insert(name, member)),
                Err(FieldError::Null { .. }) => {}
                Err(error) => return Err(not_an_object(which, &error)),
            }
        }
        let text = value.expose_text().unwrap_or_default();
        let raw: BTreeMap<String, &RawValue> = serde_json::from_str(text)
            .map_err(|_| Failure::new(Trouble::Defect, "a JSON object is read once and not twice"))?;
        let place = |raw: &RawValue| {
            let start = raw.get().as_ptr().addr() - text.as_ptr().addr();
            start..start + raw.get().len()
        };
        let places = raw.into_iter().map(|(name, raw)| (name, place(raw))).collect();
        Ok(Self { which, text, places, held })
    }

    /// A member that is a string, without its escapes.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`] where there is none of that name, or it is something else.
    pub(super) fn string(&self, name: &FieldName) -> Result<&str, Failure> {
        let name = name.as_str();
        let Some(place) = self.places.get(name) else {
            return Err(unfit(format!("{} has no member `{name}`; write a value with it", self.which)));
        };
        let string = self.starts_with(place, '"').then(|| self.held.get(name)?.expose_text()).flatten();
        string.ok_or_else(|| {
            let which = self.which;
            unfit(format!("the member `{name}` of {which} is not a string; write a value in which it is"))
        })
    }

    /// The other members that hold text: strings without their escapes, objects and arrays as they are written.
    pub(super) fn others(&self, but: &FieldName) -> impl Iterator<Item = (&str, &str)> {
        self.held.iter().filter_map(move |(name, held)| {
            let place = self.places.get(name)?;
            let holds_text = ['"', '{', '['].into_iter().any(|first| self.starts_with(place, first));
            (holds_text && name != but.as_str()).then_some((name.as_str(), held.expose_text()?))
        })
    }

    fn starts_with(&self, place: &Range<usize>, first: char) -> bool {
        self.text.get(place.clone()).is_some_and(|member| member.starts_with(first))
    }

    /// Whether no member is missing that another value has.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`], which names the member.
    pub(super) fn has_all_of(&self, other: &Object<'_>) -> Result<(), Failure> {
        let missing = other.places.keys().find(|name| !self.places.contains_key(*name));
        missing.map_or(Ok(()), |name| {
            let (which, other) = (self.which, other.which);
            Err(unfit(format!(
                "{which} lacks the member {}, which {other} has; write a whole one",
                shown(name)
            )))
        })
    }

    /// The value with these strings for members, and everything else as it was. A member that is new stands last.
    ///
    /// # Errors
    /// [`Trouble::ValueUnfit`] where it would be larger than a value may be.
    pub(super) fn with(&self, strings: &[(&str, &str)]) -> Result<SecretValue, Failure> {
        let last = self.places.values().map(|place| place.end).max();
        let end = last.or_else(|| Some(self.text.find('{')? + 1)).unwrap_or_default();
        let mut edits = Vec::with_capacity(strings.len());
        let mut comma = if last.is_some() { "," } else { "" };
        for (name, string) in strings {
            let string = quoted(string)?;
            if let Some(place) = self.places.get(*name) {
                edits.push((place.clone(), string));
            } else {
                let member = [comma, quoted(name)?.as_str(), ":", string.as_str()].concat();
                edits.push((end..end, Zeroizing::new(member)));
                comma = ",";
            }
        }
        // In a stable sort, what is new keeps its order.
        edits.sort_by_key(|(place, _)| place.start);
        value(spliced(self.text, &edits)?)
    }
}

/// A text with some of its places replaced. The places are in order and don't overlap.
///
/// # Errors
/// [`Trouble::Defect`] where a place is not one of the text's.
pub(super) fn spliced(
    text: &str,
    edits: &[(Range<usize>, Zeroizing<String>)],
) -> Result<Zeroizing<String>, Failure> {
    let out_of_place = || Failure::new(Trouble::Defect, "a text was to be replaced outside of a value");
    // Of its full size from the start: growing would leave copies behind.
    let longest = text.len() + edits.iter().map(|(_, new)| new.len()).sum::<usize>();
    let mut whole = Zeroizing::new(String::with_capacity(longest));
    let mut done = 0;
    for (place, new) in edits {
        whole.push_str(text.get(done..place.start).ok_or_else(out_of_place)?);
        whole.push_str(new);
        done = place.end;
    }
    whole.push_str(text.get(done..).ok_or_else(out_of_place)?);
    Ok(whole)
}

/// A text as a value.
///
/// # Errors
/// [`Trouble::ValueUnfit`] where it is larger than a value may be.
pub(super) fn value(mut text: Zeroizing<String>) -> Result<SecretValue, Failure> {
    let text = std::mem::take(&mut *text);
    SecretValue::text(text).map_err(|error| unfit(format!("the next value does not fit: {error}")))
}

/// A text as a JSON string.
///
/// # Errors
/// None for a text.
pub(super) fn quoted(text: &str) -> Result<Zeroizing<String>, Failure> {
    let defect = |_| Failure::new(Trouble::Defect, "a text can't be written as a JSON string");
    // A control character takes six bytes, `\u0000`; within this the buffer does not grow.
    let mut json = Zeroizing::new(Vec::<u8>::with_capacity(text.len() * 6 + 2));
    serde_json::to_writer(&mut *json, text).map_err(defect)?;
    String::from_utf8(std::mem::take(&mut *json)).map(Zeroizing::new).map_err(|error| {
        drop(Zeroizing::new(error.into_bytes()));
        Failure::new(Trouble::Defect, "a JSON string is not text")
    })
}

/// A value that a rotator can't work with.
pub(super) fn unfit(message: impl AsRef<str>) -> Failure {
    Failure::new(Trouble::ValueUnfit, message)
}

fn not_an_object(which: &str, error: &FieldError) -> Failure {
    unfit(match error {
        FieldError::NotAnObject { found } => {
            format!("{which} is not a JSON object ({found}); write one, or rotate the value as a whole")
        }
        error => format!("{which}: {error}"),
    })
}

/// A name from outside, so that it fits a line.
pub(super) fn shown(name: &str) -> String {
    const MOST: usize = 64;
    let cut: String = name.chars().take(MOST).flat_map(char::escape_default).collect();
    let dots = if name.chars().nth(MOST).is_some() { "…" } else { "" };
    format!("`{cut}{dots}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::MAX_VALUE_BYTES;
    use proptest::prelude::*;
    use serde_json::json;

    fn secret(text: &str) -> SecretValue {
        SecretValue::text(text.to_owned()).unwrap()
    }

    fn changed(text: &str, strings: &[(&str, &str)]) -> String {
        let value = secret(text);
        let changed = Object::read(CURRENT, &value).unwrap().with(strings).unwrap();
        changed.expose_text().unwrap().to_owned()
    }

    fn name(text: &str) -> FieldName {
        FieldName::parse(text).unwrap()
    }

    fn settings(value: Value) -> Settings {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn what_is_not_replaced_stays_as_it_was_written() {
        let before =
            "\n{ \"b\" :1e400 , \"pass\\u0077ord\":\t\"old\", \"a\": { \"x\":[1.10] }, \"ü\": \"\\u00fc\"}\n";
        let after = "\n{ \"b\" :1e400 , \"pass\\u0077ord\":\t\"n\\\"w\", \"a\": { \"x\":[1.10] }, \"ü\": \"\\u00fc\"}\n";
        assert_eq!(changed(before, &[("password", "n\"w")]), after);
    }

    #[test]
    fn what_is_new_stands_last() {
        assert_eq!(changed("{ }", &[("a", "1"), ("b", "2")]), "{\"a\":\"1\",\"b\":\"2\" }");
        assert_eq!(changed("{\"a\":1\n}", &[("b", "2")]), "{\"a\":1,\"b\":\"2\"\n}");
        assert_eq!(changed("{\"a\":1}", &[("b", "2"), ("a", "3")]), "{\"a\":\"3\",\"b\":\"2\"}");
        assert_eq!(changed(r#"{"a":"}"}"#, &[("b", "2")]), r#"{"a":"}","b":"2"}"#);
    }

    #[test]
    fn what_is_not_an_object_is_refused_unseen() {
        for text in ["canary", "[\"canary\"]", "\"canary\"", "", "{\"canary", "{\"a\":\"canary\",\"a\":1}"] {
            let failure = Object::read(CURRENT, &secret(text)).err().unwrap();
            assert_eq!(failure.trouble, Trouble::ValueUnfit, "{text}");
            assert!(failure.message.starts_with(CURRENT), "{failure}");
            assert!(!failure.message.contains("canary"), "{failure}");
        }
        let binary = SecretValue::binary(b"{}".to_vec()).unwrap();
        assert_eq!(Object::read(CURRENT, &binary).err().unwrap().trouble, Trouble::ValueUnfit);
    }

    #[test]
    fn a_member_is_a_string_or_is_named() {
        let value = secret(r#"{"text":"t","number":5,"null":null,"nested":{}}"#);
        let object = Object::read(CURRENT, &value).unwrap();
        assert_eq!(object.string(&name("text")).unwrap(), "t");
        for other in ["number", "null", "nested", "absent"] {
            let failure = object.string(&name(other)).unwrap_err();
            assert_eq!(failure.trouble, Trouble::ValueUnfit);
            assert!(failure.message.contains(&format!("`{other}`")), "{failure}");
        }
        let others: Vec<_> = object.others(&name("text")).collect();
        assert_eq!(others, [("nested", "{}")]);
    }

    #[test]
    fn a_missing_member_is_named() {
        let (whole, part) = (secret(r#"{"a":1,"b":null}"#), secret(r#"{"a":"x","c":2}"#));
        let (whole, part) = (Object::read(CURRENT, &whole).unwrap(), Object::read(PENDING, &part).unwrap());
        let failure = part.has_all_of(&whole).unwrap_err();
        assert_eq!(
            failure.message,
            "AWSPENDING lacks the member `b`, which AWSCURRENT has; write a whole one"
        );
        assert!(whole.has_all_of(&whole).is_ok());
    }

    #[test]
    fn the_largest_value_is_changed_and_a_larger_one_refused() {
        let pad = "x".repeat(MAX_VALUE_BYTES - r#"{"pad":"","a":"1234"}"#.len());
        let value = secret(&format!(r#"{{"pad":"{pad}","a":"1234"}}"#));
        assert_eq!(value.len(), MAX_VALUE_BYTES);
        let object = Object::read(CURRENT, &value).unwrap();
        assert_eq!(object.with(&[("a", "5678")]).unwrap().len(), MAX_VALUE_BYTES);
        let failure = object.with(&[("a", "56789")]).unwrap_err();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains("65537 bytes"), "{failure}");
    }

    #[test]
    fn settings_are_read_strictly() {
        let table = settings(json!({ "lenght": 40 }));
        let problem = only(&table, &["field", "length"]).unwrap_err();
        assert_eq!(problem, "unknown key `lenght`; did you mean `length`?");
        assert!(only(&table, &["lenght"]).is_ok());
        let table = settings(json!({ "n": 1, "l": ["a", "a"], "m": ["a", 1], "f": "a b", "g": ["x", "y"] }));
        assert!(text(&table, "n").unwrap_err().contains("`n`"));
        assert!(texts(&table, "l").unwrap_err().contains("twice"));
        assert!(texts(&table, "m").unwrap_err().contains("`m`"));
        assert!(texts(&table, "n").unwrap_err().contains("list"));
        assert!(field(&table, "f").unwrap_err().starts_with("`f`: field `a b`"));
        assert_eq!(fields(&table, "g").unwrap().unwrap(), [name("x"), name("y")]);
        assert_eq!(text(&table, "absent").unwrap(), None);
    }

    fn any_member() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::btree_map("[a-z]{1,3}", inner, 0..3)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn other_members_are_unchanged(
            members in proptest::collection::btree_map("[a-zü\"]{1,4}", any_member(), 0..6),
            changed_name in "[a-zü\"]{1,4}",
            string in ".{0,40}",
            pretty in any::<bool>(),
        ) {
            let before = Value::Object(members.clone().into_iter().collect());
            let text = if pretty { serde_json::to_string_pretty(&before) } else { serde_json::to_string(&before) };
            let after = changed(&text.unwrap(), &[(changed_name.as_str(), string.as_str())]);
            let mut expected = members;
            expected.insert(changed_name, Value::from(string));
            let after: BTreeMap<String, Value> = serde_json::from_str(&after).unwrap();
            prop_assert_eq!(after, expected);
        }

        #[test]
        fn reading_never_panics(text in "\\PC{0,80}", string in ".{0,8}") {
            let value = secret(&text);
            if let Ok(object) = Object::read(CURRENT, &value) {
                prop_assert!(object.with(&[("a", string.as_str())]).is_ok());
            }
        }
    }
}
