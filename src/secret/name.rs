//! Environment, secret and field names: parsed once at the edge, never re-checked inside.

use std::fmt;
use std::sync::Arc;

use crate::error::{Reason, Reasoned};

/// The longest secret name, in bytes (AWS Secrets Manager, `CreateSecret`, `Name`).
const MAX_SECRET_NAME: usize = 512;
/// The longest DNS label, in bytes (RFC 1035, section 2.3.4).
const MAX_ENVIRONMENT_NAME: usize = 63;
const MAX_FIELD_NAME: usize = 256;

/// Why a name was refused: what kind of name, where in it, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {shown}: {problem}")]
pub struct NameError {
    kind: &'static str,
    shown: String,
    problem: String,
    reason: Reason,
}

impl NameError {
    pub(super) fn new(kind: &'static str, text: &str, problem: impl Into<String>, reason: Reason) -> Self {
        Self { kind, shown: shown(text), problem: problem.into(), reason }
    }
}

impl Reasoned for NameError {
    fn reason(&self) -> Reason {
        self.reason
    }
}

/// Quotes what a stranger typed so that it fits one line of a log: control and non-ASCII characters are escaped,
/// and what is long is cut.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 64;
    let cut: String = text.chars().take(MOST).flat_map(char::escape_default).collect();
    let dots = if text.chars().nth(MOST).is_some() { "…" } else { "" };
    format!("`{cut}{dots}`")
}

/// The first character that `permitted` refuses, with its position (1-based, in characters).
pub(super) fn first_refused(text: &str, permitted: impl Fn(char) -> bool) -> Option<(usize, char)> {
    text.chars().enumerate().find(|(_, c)| !permitted(*c)).map(|(index, c)| (index + 1, c))
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(super) use name_type;

name_type! {
    /// The name of an environment: a DNS label (RFC 1035 as relaxed by RFC 1123: `a-z`, `0-9`, inner hyphens,
    /// 1–63 bytes, lower case only). `claviger` is reserved: it is the scheme of a reference.
    EnvironmentName
}

impl EnvironmentName {
    /// Parses an environment's name.
    ///
    /// # Errors
    /// [`Reason::InvalidEnvironment`], saying which character at which position is refused.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let refuse =
            |problem: String| Err(NameError::new("environment", text, problem, Reason::InvalidEnvironment));
        if text.is_empty() {
            return refuse("is empty; name one, for example `development`".to_owned());
        }
        if text.len() > MAX_ENVIRONMENT_NAME {
            return refuse(format!(
                "is {} bytes long; at most {MAX_ENVIRONMENT_NAME} fit a DNS label",
                text.len()
            ));
        }
        let permitted = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if let Some((position, c)) = first_refused(text, permitted) {
            return refuse(format!(
                "character {position} ({}) is not one of a-z, 0-9 and -",
                shown(c.encode_utf8(&mut [0; 4]))
            ));
        }
        if text.starts_with('-') || text.ends_with('-') {
            return refuse("starts or ends with a hyphen, which a DNS label can't".to_owned());
        }
        if text == "claviger" {
            return refuse("is reserved; choose another name".to_owned());
        }
        Ok(Self(text.into()))
    }
}

name_type! {
    /// The name of a secret within an environment. AWS's grammar (`CreateSecret`, `Name`): 1–512 of
    /// `A-Za-z0-9/_+=.@-`; beyond it no empty, `.` or `..` segment, no leading hyphen, and nothing under
    /// `_internal/`, which is the broker's own.
    SecretName
}

impl SecretName {
    /// Parses a secret's name. Nothing is normalised: what is not right is refused.
    ///
    /// # Errors
    /// [`Reason::InvalidName`], saying what is refused and where.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let refuse = |problem: String| Err(NameError::new("secret name", text, problem, Reason::InvalidName));
        if text.is_empty() {
            return refuse("is empty".to_owned());
        }
        if text.len() > MAX_SECRET_NAME {
            return refuse(format!("is {} bytes long; at most {MAX_SECRET_NAME} are permitted", text.len()));
        }
        let permitted = |c: char| c.is_ascii_alphanumeric() || "/_+=.@-".contains(c);
        if let Some((position, c)) = first_refused(text, permitted) {
            return refuse(format!(
                "character {position} ({}) is not one of A-Z, a-z, 0-9 and /_+=.@-",
                shown(c.encode_utf8(&mut [0; 4]))
            ));
        }
        if text.starts_with('-') {
            return refuse("starts with a hyphen, which a command line takes for an option".to_owned());
        }
        for (index, segment) in text.split('/').enumerate() {
            let position = index + 1;
            match segment {
                "" => return refuse(format!("segment {position} between slashes is empty")),
                "." | ".." => {
                    return refuse(format!("segment {position} is `{segment}`; write the name out"));
                }
                _ => {}
            }
        }
        if text == "_internal" || text.starts_with("_internal/") {
            return refuse("lies under `_internal`, which is reserved".to_owned());
        }
        Ok(Self(text.into()))
    }
}

name_type! {
    /// The name of one member of a secret whose value is a JSON object: 1–256 of `A-Za-z0-9_.-`. A dot is a
    /// character like another: `a.b` is the member `a.b`, not a path.
    FieldName
}

impl FieldName {
    /// Parses a field's name.
    ///
    /// # Errors
    /// [`Reason::InvalidField`], saying what is refused and where.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let refuse = |problem: String| Err(NameError::new("field", text, problem, Reason::InvalidField));
        if text.is_empty() {
            return refuse("is empty; leave out the `#` to mean the whole value".to_owned());
        }
        if text.len() > MAX_FIELD_NAME {
            return refuse(format!("is {} bytes long; at most {MAX_FIELD_NAME} are permitted", text.len()));
        }
        let permitted = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if let Some((position, c)) = first_refused(text, permitted) {
            return refuse(format!(
                "character {position} ({}) is not one of A-Z, a-z, 0-9 and _.-",
                shown(c.encode_utf8(&mut [0; 4]))
            ));
        }
        Ok(Self(text.into()))
    }
}

/// Which secret: a name within an environment. An environment is never guessed from a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretId {
    /// The environment.
    pub environment: EnvironmentName,
    /// The name within it.
    pub name: SecretName,
}

impl SecretId {
    /// The secret `name` of `environment`.
    #[must_use]
    pub const fn new(environment: EnvironmentName, name: SecretName) -> Self {
        Self { environment, name }
    }

    /// Parses both parts.
    ///
    /// # Errors
    /// As [`EnvironmentName::parse`] and [`SecretName::parse`].
    pub fn parse(environment: &str, name: &str) -> Result<Self, NameError> {
        Ok(Self { environment: EnvironmentName::parse(environment)?, name: SecretName::parse(name)? })
    }
}

impl fmt::Display for SecretId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.environment, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn environments_are_dns_labels() {
        for good in ["development", "pr-1234", "a", "0", &"x".repeat(63)] {
            assert_eq!(EnvironmentName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", " ", "Prod", "-a", "a-", "a.b", "a_b", "рrod", "claviger", "a\n", &"x".repeat(64)] {
            assert_eq!(
                EnvironmentName::parse(bad).unwrap_err().reason(),
                Reason::InvalidEnvironment,
                "{bad:?}"
            );
        }
    }

    #[test]
    fn secret_names_follow_the_grammar_and_are_not_normalised() {
        for good in ["database", "a/b/c", "A+b=c.d@e-f_g", "...", "a/.../b", &"x".repeat(512), "_internal2"] {
            assert_eq!(SecretName::parse(good).unwrap().as_str(), good);
        }
        let long = "x".repeat(513);
        for bad in [
            "",
            " ",
            "   ",
            "../prod/db",
            "dev/../prod",
            "a//b",
            "a/",
            "/a",
            ".",
            "..",
            "a\0b",
            "a\nb",
            "a\rb",
            "a\tb",
            "рrod",
            "é",
            "e\u{301}",
            "-rf",
            "_internal/x",
            "_internal",
            "a:b",
            "a#b",
            "a b",
            &long,
        ] {
            assert_eq!(SecretName::parse(bad).unwrap_err().reason(), Reason::InvalidName, "{bad:?}");
        }
    }

    #[test]
    fn errors_name_the_place_and_stay_on_one_line() {
        let error = SecretName::parse("data\nbase").unwrap_err().to_string();
        assert_eq!(
            error,
            r"secret name `data\nbase`: character 5 (`\n`) is not one of A-Z, a-z, 0-9 and /_+=.@-"
        );
        let error = EnvironmentName::parse("рrod").unwrap_err().to_string();
        assert_eq!(error, r"environment `\u{440}rod`: character 1 (`\u{440}`) is not one of a-z, 0-9 and -");
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_messages_are_one_short_line(text in ".{0,600}") {
            for error in [
                SecretName::parse(&text).err(),
                EnvironmentName::parse(&text).err(),
                FieldName::parse(&text).err(),
            ].into_iter().flatten() {
                let message = error.to_string();
                prop_assert!(message.chars().all(|c| !c.is_control()));
                prop_assert!(message.len() < 1_200);
            }
        }

        #[test]
        fn what_parses_keeps_its_text(text in "[A-Za-z0-9_+=.@-]{1,20}(/[A-Za-z0-9_+=.@-]{1,20}){0,4}") {
            if let Ok(name) = SecretName::parse(&text) {
                prop_assert_eq!(name.as_str(), text);
            }
        }
    }
}
