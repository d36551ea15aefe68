//! Versions: one immutable value each, under an id that is never used again.

use jiff::Timestamp;

use super::label::Label;
use super::name::{NameError, first_refused, name_type, shown};
use crate::error::Reason;

use std::fmt;
use std::sync::Arc;

name_type! {
    /// The id of a version: a UUID, or the caller's client request token. 32–64 characters (AWS Secrets Manager,
    /// `PutSecretValue`, `ClientRequestToken`), here of `A-Za-z0-9_.-`.
    VersionId
}

impl VersionId {
    /// Parses a version id or a client request token.
    ///
    /// # Errors
    /// [`Reason::InvalidVersionId`], saying the length or the character that is refused.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let refuse =
            |problem: String| Err(NameError::new("version id", text, problem, Reason::InvalidVersionId));
        if !(32..=64).contains(&text.chars().count()) {
            return refuse(format!(
                "is {} characters long; a version id or client request token has 32 to 64",
                text.chars().count()
            ));
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

    /// A fresh random id (a version 4 UUID, RFC 9562).
    #[must_use]
    pub fn generate() -> Self {
        Self(uuid::Uuid::new_v4().to_string().into())
    }
}

/// What is known of a version without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Its id.
    pub id: VersionId,
    /// The labels that it carries now, sorted.
    pub labels: Vec<Label>,
    /// When it was written.
    pub created_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reasoned;

    #[test]
    fn ids_are_32_to_64_permitted_characters() {
        assert!(VersionId::parse(&"a".repeat(32)).is_ok());
        assert!(VersionId::parse(&"a".repeat(64)).is_ok());
        assert!(VersionId::parse(VersionId::generate().as_str()).is_ok());
        for bad in ["", &"a".repeat(31), &"a".repeat(65), &"é".repeat(32), &format!("{} ", "a".repeat(32))] {
            assert_eq!(VersionId::parse(bad).unwrap_err().reason(), Reason::InvalidVersionId, "{bad:?}");
        }
        assert_ne!(VersionId::generate(), VersionId::generate());
    }
}
