//! Values: opaque bytes that wipe themselves, with one way out.
//!
//! A [`SecretValue`] has no `Display` and no `Serialize`, and its `Debug` shows a size at most. The way out is
//! [`SecretValue::expose`]; `grep -rn '\.expose()' src` lists every place where a value is seen.
//!
//! What wiping does not reach: the buffers of the HTTP/2 and TLS libraries, of protobuf decoding and of the JSON
//! parser's scratch space while a field with escapes is read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretSlice};
use serde::Deserializer as _;
use serde::de::{self, MapAccess, Visitor};
use serde_json::value::RawValue;
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use super::name::FieldName;
use crate::error::{Reason, Reasoned};

/// The largest value, in bytes (AWS Secrets Manager quotas, "Secret value size").
pub const MAX_VALUE_BYTES: usize = 65_536;

/// Whether a value is text or bytes; AWS's `SecretString` and `SecretBinary`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContentType {
    /// UTF-8 text.
    Text,
    /// Any bytes.
    Binary,
}

impl ContentType {
    /// The stable name, as bound into a ciphertext's associated data.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Binary => "binary",
        }
    }
}

/// Why bytes are not a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// Larger than [`MAX_VALUE_BYTES`].
    #[error("value is {size} bytes; at most {MAX_VALUE_BYTES} are permitted")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// Called text, but not UTF-8.
    #[error("value is not UTF-8 at byte {position}; store it as binary")]
    NotUtf8 {
        /// The first byte that is not, 1-based.
        position: usize,
    },
}

impl Reasoned for ValueError {
    fn reason(&self) -> Reason {
        match self {
            Self::TooLarge { .. } => Reason::ValueTooLarge,
            Self::NotUtf8 { .. } => Reason::InvalidValue,
        }
    }
}

/// Why a field can't be read. Holds positions and names, never text of the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldError {
    /// The value is not a JSON object at all.
    #[error("the value is not a JSON object ({found}); ask for the whole value, without a field")]
    NotAnObject {
        /// What it is instead.
        found: &'static str,
    },
    /// The value starts as a JSON object but is not valid JSON.
    #[error("the value is not valid JSON at line {line}, column {column} ({problem}); put a corrected value")]
    NotJson {
        /// 1-based.
        line: usize,
        /// 1-based.
        column: usize,
        /// What kind of fault, without the text.
        problem: &'static str,
    },
    /// A member stands twice: which one is meant can't be known.
    #[error("the value has the field `{field}` twice; put a corrected value")]
    Duplicate {
        /// The member.
        field: String,
    },
    /// The object has no such member.
    #[error("no field `{field}`; the value has {present}")]
    NotFound {
        /// The member asked for.
        field: String,
        /// How many members there are. Their names are the value's own business.
        present: String,
    },
    /// The member is a JSON string that no text corresponds to.
    #[error("the field `{field}` holds half of a Unicode surrogate pair; put a corrected value")]
    NotText {
        /// The member.
        field: String,
    },
    /// The member is JSON `null`.
    #[error("the field `{field}` is null; put a value with the field set")]
    Null {
        /// The member.
        field: String,
    },
}

impl Reasoned for FieldError {
    fn reason(&self) -> Reason {
        match self {
            Self::NotAnObject { .. }
            | Self::NotJson { .. }
            | Self::Duplicate { .. }
            | Self::NotText { .. } => Reason::NotAnObject,
            Self::NotFound { .. } | Self::Null { .. } => Reason::FieldNotFound,
        }
    }
}

/// A secret's value. Cheap to clone: clones share one buffer, which is wiped when the last one goes.
#[derive(Clone)]
pub struct SecretValue {
    bytes: Arc<SecretSlice<u8>>,
    content_type: ContentType,
}

impl SecretValue {
    /// Takes text. The buffer is taken over, or copied and wiped.
    ///
    /// # Errors
    /// [`ValueError::TooLarge`].
    pub fn text(text: String) -> Result<Self, ValueError> {
        Self::new(text.into_bytes(), ContentType::Text)
    }

    /// Takes bytes.
    ///
    /// # Errors
    /// [`ValueError::TooLarge`].
    pub fn binary(bytes: Vec<u8>) -> Result<Self, ValueError> {
        Self::new(bytes, ContentType::Binary)
    }

    /// Takes bytes that are said to be of `content_type`. Wipes them where it refuses.
    ///
    /// # Errors
    /// [`ValueError`].
    pub fn new(mut bytes: Vec<u8>, content_type: ContentType) -> Result<Self, ValueError> {
        let size = bytes.len();
        if size > MAX_VALUE_BYTES {
            bytes.zeroize();
            return Err(ValueError::TooLarge { size });
        }
        if content_type == ContentType::Text
            && let Err(error) = std::str::from_utf8(&bytes)
        {
            let position = error.valid_up_to() + 1;
            bytes.zeroize();
            return Err(ValueError::NotUtf8 { position });
        }
        Ok(Self { bytes: Arc::new(SecretSlice::from(boxed(bytes))), content_type })
    }

    /// Takes bytes that came from a file or a pipe: text where they are UTF-8, else binary.
    ///
    /// # Errors
    /// [`ValueError::TooLarge`].
    pub fn sniff(bytes: Vec<u8>) -> Result<Self, ValueError> {
        let content_type =
            if std::str::from_utf8(&bytes).is_ok() { ContentType::Text } else { ContentType::Binary };
        Self::new(bytes, content_type)
    }

    /// The one way out. Whoever calls this answers for where the bytes go.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.bytes.expose_secret()
    }

    /// The bytes as text; `None` for a value that is binary.
    #[must_use]
    pub fn expose_text(&self) -> Option<&str> {
        match self.content_type {
            ContentType::Text => std::str::from_utf8(self.expose()).ok(),
            ContentType::Binary => None,
        }
    }

    /// Text or bytes.
    #[must_use]
    pub const fn content_type(&self) -> ContentType {
        self.content_type
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.expose().len()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.expose().is_empty()
    }

    /// Whether both are of one type and hold the same bytes, in time that depends on their length alone.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.content_type == other.content_type && bool::from(self.expose().ct_eq(other.expose()))
    }

    /// One member of a value that is a JSON object. A string is given unescaped; a number, `true` or `false` exactly
    /// as it was written (`1.10` stays `1.10`); an object or array as its JSON text.
    ///
    /// # Errors
    /// [`FieldError`].
    pub fn field(&self, name: &FieldName) -> Result<Self, FieldError> {
        let mut members = self.members(Some(name.as_str()))?;
        let count = members.count;
        members.found.remove(name.as_str()).ok_or_else(|| FieldError::NotFound {
            field: name.to_string(),
            present: match count {
                0 => "no fields".to_owned(),
                1 => "one other field".to_owned(),
                n => format!("{n} other fields"),
            },
        })?
    }

    /// Every member of a value that is a JSON object, by name. A member that is `null` is an error of its own.
    ///
    /// # Errors
    /// [`FieldError`], for the value as a whole.
    pub fn fields(&self) -> Result<BTreeMap<String, Result<Self, FieldError>>, FieldError> {
        Ok(self.members(None)?.found)
    }

    fn members(&self, wanted: Option<&str>) -> Result<Members, FieldError> {
        let text = self.expose_text().ok_or(FieldError::NotAnObject { found: "it is binary" })?;
        if !text.trim_start().starts_with('{') {
            return Err(FieldError::NotAnObject { found: kind_of(text) });
        }
        let mut duplicate = None;
        let mut parser = serde_json::Deserializer::from_str(text);
        parser
            .deserialize_map(Collect { wanted, duplicate: &mut duplicate })
            .and_then(|members| parser.end().map(|()| members))
            .map_err(|error| match duplicate {
                Some(field) => FieldError::Duplicate { field },
                None => FieldError::NotJson {
                    line: error.line(),
                    column: error.column(),
                    problem: match error.classify() {
                        serde_json::error::Category::Eof => "it ends too early",
                        _ => "syntax error",
                    },
                },
            })
    }
}

/// What a value is that is not a JSON object, said without showing any of it.
fn kind_of(text: &str) -> &'static str {
    match serde_json::from_str::<&RawValue>(text).map(|raw| raw.get().as_bytes().first().copied()) {
        Ok(Some(b'[')) => "it is a JSON array",
        Ok(Some(b'"')) => "it is a JSON string",
        Ok(Some(_)) => "it is a JSON number or literal",
        _ => "it is plain text",
    }
}

/// Takes over the buffer where it is exact; otherwise copies and wipes, because shrinking would leave a copy behind.
fn boxed(mut bytes: Vec<u8>) -> Box<[u8]> {
    if bytes.len() == bytes.capacity() {
        return bytes.into_boxed_slice();
    }
    let exact: Box<[u8]> = bytes.as_slice().into();
    bytes.zeroize();
    exact
}

struct Members {
    found: BTreeMap<String, Result<SecretValue, FieldError>>,
    count: usize,
}

/// Walks an object's members, refuses one that stands twice, and unescapes only what is wanted.
struct Collect<'a> {
    wanted: Option<&'a str>,
    duplicate: &'a mut Option<String>,
}

impl<'de> Visitor<'de> for Collect<'_> {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut seen = std::collections::BTreeSet::new();
        let mut found = BTreeMap::new();
        while let Some((name, raw)) = map.next_entry::<String, &'de RawValue>()? {
            if !seen.insert(name.clone()) {
                *self.duplicate = Some(name.escape_default().to_string());
                return Err(de::Error::custom("duplicate"));
            }
            if self.wanted.is_none_or(|wanted| wanted == name) {
                let value = member(&name, raw.get());
                found.insert(name, value);
            }
        }
        Ok(Members { found, count: seen.len() })
    }
}

fn member(name: &str, raw: &str) -> Result<SecretValue, FieldError> {
    let text = match raw.as_bytes().first() {
        // Well-formed JSON can still hold what is no text: half of a surrogate pair (RFC 8259, section 8.2).
        Some(b'"') => {
            serde_json::from_str::<String>(raw).map_err(|_| FieldError::NotText { field: name.to_owned() })?
        }
        Some(b'n') => return Err(FieldError::Null { field: name.to_owned() }),
        _ => raw.to_owned(),
    };
    // A member is no longer than the value that holds it, which fitted.
    SecretValue::text(text).map_err(|_| FieldError::NotAnObject { found: "it is too large" })
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretValue([redacted], {})", self.content_type.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> SecretValue {
        SecretValue::text(text.to_owned()).unwrap()
    }

    fn field(value: &str, name: &str) -> Result<String, FieldError> {
        text(value)
            .field(&FieldName::parse(name).unwrap())
            .map(|found| found.expose_text().unwrap().to_owned())
    }

    #[test]
    fn debug_shows_nothing() {
        let shown = format!("{:?}", text("canary-5f3a"));
        assert_eq!(shown, "SecretValue([redacted], text)");
    }

    #[test]
    fn sizes_and_encodings_are_checked() {
        assert!(SecretValue::binary(vec![0; MAX_VALUE_BYTES]).is_ok());
        let error = SecretValue::binary(vec![0; MAX_VALUE_BYTES + 1]).unwrap_err();
        assert_eq!(error.reason(), Reason::ValueTooLarge);
        assert_eq!(
            SecretValue::new(vec![b'a', 0xff], ContentType::Text).unwrap_err(),
            ValueError::NotUtf8 { position: 2 }
        );
        assert_eq!(SecretValue::sniff(vec![0xff]).unwrap().content_type(), ContentType::Binary);
    }

    #[test]
    fn fields_are_exact() {
        let value = r#"{"port":5432,"big":12345678901234567890,"huge":1e400,"money":1.10,"on":true,
                        "nested":{"a": [1]},"__proto__":"p","a.b":"dot","esc":"a\"\u00e9\n","empty":""}"#;
        for (name, expected) in [
            ("port", "5432"),
            ("big", "12345678901234567890"),
            ("huge", "1e400"),
            ("money", "1.10"),
            ("on", "true"),
            ("nested", r#"{"a": [1]}"#),
            ("__proto__", "p"),
            ("a.b", "dot"),
            ("esc", "a\"é\n"),
            ("empty", ""),
        ] {
            assert_eq!(field(value, name).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn what_is_not_an_object_says_so() {
        for value in ["plain", "[1]", "\"s\"", "5", "", "{", "{\"a\":1} x", "{\"a\":1,}"] {
            let error = field(value, "a").unwrap_err();
            assert_eq!(error.reason(), Reason::NotAnObject, "{value:?}");
        }
        let error = field(r#"{"password":"canary-1","password":"canary-2"}"#, "password").unwrap_err();
        assert_eq!(error, FieldError::Duplicate { field: "password".to_owned() });
        assert_eq!(field(r#"{"a":null}"#, "a").unwrap_err().reason(), Reason::FieldNotFound);
        assert_eq!(
            field(r#"{"a":1}"#, "b").unwrap_err().to_string(),
            "no field `b`; the value has one other field"
        );
    }

    #[test]
    fn no_error_shows_the_value() {
        for value in
            ["canary-5f3a", "{\"canary-5f3a", "{\"a\":canary-5f3a}", "{\"a\":\"canary-5f3a\"} canary-5f3a"]
        {
            let error = field(value, "b").unwrap_err();
            assert!(!error.to_string().contains("canary"), "{error}");
            assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        }
    }

    #[test]
    fn equality_is_of_bytes_and_type() {
        assert!(text("a").same_as(&text("a")));
        assert!(!text("a").same_as(&text("b")));
        assert!(!text("a").same_as(&SecretValue::binary(b"a".to_vec()).unwrap()));
    }

    proptest! {
        #[test]
        fn strings_come_back_as_they_were_put(name in "[a-z]{1,8}", content in ".{0,64}") {
            let object = serde_json::json!({ name.clone(): content }).to_string();
            prop_assert_eq!(field(&object, &name).unwrap(), content);
        }

        #[test]
        fn reading_a_field_never_panics(value in ".{0,200}") {
            let _ = field(&value, "a");
            let _ = text(&value).fields();
        }
    }
}
