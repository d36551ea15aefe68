//! `[environment:]name[#field]`: how a manifest or a person points at a value.

use std::fmt;
use std::str::FromStr;

use super::name::{EnvironmentName, FieldName, NameError, SecretName};
use crate::error::Reason;

/// A pointer to a secret or to one field of it. Without an environment it means the caller's chosen one.
///
/// Neither `:` nor `#` may stand in a name, so the grammar is unambiguous.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// The environment, where the reference names one.
    pub environment: Option<EnvironmentName>,
    /// The secret.
    pub name: SecretName,
    /// The member of its JSON object, where the reference names one.
    pub field: Option<FieldName>,
}

impl Reference {
    /// Parses `[environment:]name[#field]`.
    ///
    /// # Errors
    /// [`Reason::InvalidReference`] for a second `:` or `#`; otherwise the refused part's own reason.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let refuse = |problem: &str| NameError::new("reference", text, problem, Reason::InvalidReference);
        if text.is_empty() {
            return Err(refuse("is empty; write `[environment:]name[#field]`"));
        }
        let (path, field) = match text.split_once('#') {
            Some((_, field)) if field.contains('#') => {
                return Err(refuse("has more than one `#`; a field's name can't hold one"));
            }
            Some((path, field)) => (path, Some(FieldName::parse(field)?)),
            None => (text, None),
        };
        let (environment, name) = match path.split_once(':') {
            Some((_, name)) if name.contains(':') => {
                return Err(refuse("has more than one `:`; write `[environment:]name[#field]`"));
            }
            Some((environment, name)) => (Some(EnvironmentName::parse(environment)?), name),
            None => (None, path),
        };
        Ok(Self { environment, name: SecretName::parse(name)?, field })
    }

    /// Parses a reference behind the scheme `claviger:`, as a dotenv file holds it; `None` where the text does not
    /// start with the scheme and so is a plain value.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_with_scheme(text: &str) -> Option<Result<Self, NameError>> {
        text.strip_prefix("claviger:").map(Self::parse)
    }
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(environment) = &self.environment {
            write!(f, "{environment}:")?;
        }
        f.write_str(self.name.as_str())?;
        if let Some(field) = &self.field {
            write!(f, "#{field}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned;
    use proptest::prelude::*;

    #[test]
    fn parts_are_kept_apart() {
        let reference = Reference::parse("production:a/b#c.d").unwrap();
        assert_eq!(reference.environment.as_ref().unwrap().as_str(), "production");
        assert_eq!(reference.name.as_str(), "a/b");
        assert_eq!(reference.field.as_ref().unwrap().as_str(), "c.d");
        let plain = Reference::parse("database").unwrap();
        assert!(plain.environment.is_none() && plain.field.is_none());
    }

    #[test]
    fn each_bad_part_has_its_own_reason() {
        for (text, reason) in [
            ("", Reason::InvalidReference),
            ("a:b:c", Reason::InvalidReference),
            ("a#b#c", Reason::InvalidReference),
            ("a#", Reason::InvalidField),
            (":a", Reason::InvalidEnvironment),
            ("claviger:a", Reason::InvalidEnvironment),
            ("production:", Reason::InvalidName),
            ("#f", Reason::InvalidName),
        ] {
            assert_eq!(Reference::parse(text).unwrap_err().reason(), reason, "{text:?}");
        }
    }

    #[test]
    fn the_scheme_is_told_from_a_plain_value() {
        assert!(Reference::parse_with_scheme("database#password").is_none());
        let found = Reference::parse_with_scheme("claviger:production:database#password").unwrap().unwrap();
        assert_eq!(found.to_string(), "production:database#password");
    }

    proptest! {
        #[test]
        fn display_parses_back(
            environment in proptest::option::of("[a-z0-9]{1,10}"),
            name in "[A-Za-z0-9_+=.@]{1,10}(/[A-Za-z0-9_+=@]{1,10}){0,3}",
            field in proptest::option::of("[A-Za-z0-9_.-]{1,20}"),
        ) {
            let mut text = String::new();
            if let Some(environment) = &environment { text += &format!("{environment}:"); }
            text += &name;
            if let Some(field) = &field { text += &format!("#{field}"); }
            if let Ok(reference) = Reference::parse(&text) {
                prop_assert_eq!(reference.to_string(), text);
            }
        }

        #[test]
        fn parsing_never_panics(text in ".{0,200}") {
            let _ = Reference::parse(&text);
        }
    }
}
