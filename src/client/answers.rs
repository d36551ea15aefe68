//! What a [`Client`](super::Client) asks with and is answered, in the house's own words.

use std::time::Duration;

use jiff::Timestamp;

use super::error::ClientError;
use crate::secret::{
    FieldName, Label, Reference, SecretId, SecretName, SecretValue, Selector, Version, VersionId,
};

/// What can point at a secret: `"database#password"`, `("database", "password")` for a name and a field, a
/// [`Reference`], a [`SecretName`].
pub trait ToReference {
    /// The reference.
    ///
    /// # Errors
    /// Where the text is none.
    fn to_reference(&self) -> Result<Reference, ClientError>;
}

impl<T: ToReference + ?Sized> ToReference for &T {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        (**self).to_reference()
    }
}

impl ToReference for str {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        Ok(Reference::parse(self)?)
    }
}

impl ToReference for String {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        self.as_str().to_reference()
    }
}

impl ToReference for Reference {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        Ok(self.clone())
    }
}

impl ToReference for SecretName {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        Ok(Reference { environment: None, name: self.clone(), field: None })
    }
}

impl ToReference for SecretId {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        Ok(Reference { environment: Some(self.environment.clone()), name: self.name.clone(), field: None })
    }
}

impl<N: AsRef<str>, F: AsRef<str>> ToReference for (N, F) {
    fn to_reference(&self) -> Result<Reference, ClientError> {
        let field = Some(FieldName::parse(self.1.as_ref())?);
        Ok(Reference { environment: None, name: SecretName::parse(self.0.as_ref())?, field })
    }
}

/// Which version of which secret, and how fresh.
///
/// ```
/// use claviger::client::Query;
///
/// let query = Query::new("database#password")?.refreshed();
/// # Ok::<(), claviger::client::ClientError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub(super) reference: Reference,
    pub(super) selector: Selector,
    pub(super) unless: Option<VersionId>,
    pub(super) refresh: bool,
}

impl Query {
    /// The current version (AWSCURRENT), from the broker's cache where that has it.
    ///
    /// # Errors
    /// Where the reference is none.
    pub fn new(reference: impl ToReference) -> Result<Self, ClientError> {
        let reference = reference.to_reference()?;
        Ok(Self { reference, selector: Selector::CURRENT, unless: None, refresh: false })
    }

    /// Another version: by its label or its id.
    #[must_use]
    pub fn version(self, selector: Selector) -> Self {
        Self { selector, ..self }
    }

    /// No value where this version, which the caller has, is still the one.
    #[must_use]
    pub fn unless(self, version: VersionId) -> Self {
        Self { unless: Some(version), ..self }
    }

    /// From the store, not from the broker's cache; where the store can't be asked there is no answer. In a batch, one
    /// query that says so says it for all.
    #[must_use]
    pub fn refreshed(self) -> Self {
        Self { refresh: true, ..self }
    }
}

/// One version of a secret, or one field of it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Answer {
    /// The secret, and the environment that answered.
    pub id: SecretId,
    /// The field, where one was asked for; the value is then the field's alone.
    pub field: Option<FieldName>,
    /// The version.
    pub version: Version,
    /// The value; `None` where the caller said that it has this version.
    pub value: Option<SecretValue>,
    /// How long ago the store said so.
    pub age: Duration,
    /// Past its time to live, because the store can't be reached.
    pub stale: bool,
    /// The version is being rotated in and was found to work.
    pub rotating: bool,
}

/// A secret without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Description {
    /// The secret.
    pub id: SecretId,
    /// Its versions, newest first.
    pub versions: Vec<Version>,
    /// When its first version was written.
    pub created_at: Timestamp,
    /// When a version was last written or a label last moved.
    pub changed_at: Timestamp,
    /// When it will be gone, where it is deleted.
    pub deletion_at: Option<Timestamp>,
}

/// A name of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// The secret's name.
    pub name: SecretName,
    /// When a version was last written or a label last moved.
    pub changed_at: Timestamp,
    /// When it will be gone, where it is deleted.
    pub deletion_at: Option<Timestamp>,
}

/// What must be so for a version to be written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Expected {
    /// Nothing.
    #[default]
    Anything,
    /// The secret does not exist.
    Absent,
    /// This version is AWSCURRENT.
    Version(VersionId),
}

/// How a version is written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PutOptions {
    /// What must be so.
    pub expected: Expected,
    /// The labels that the version asks for; none means AWSCURRENT.
    pub labels: Vec<Label>,
    /// An empty value is meant.
    pub allow_empty: bool,
    /// Becomes the version's id; `None` means a fresh one for each call. One that is used again with the same value
    /// changes nothing.
    pub token: Option<VersionId>,
}

/// What a put left.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written {
    /// The version.
    pub version: Version,
    /// False where the work was found done.
    pub changed: bool,
}

/// What a rollback left.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RolledBack {
    /// The version that is current now.
    pub version: Version,
    /// The version that was current before.
    pub superseded: Option<VersionId>,
}

/// Who uses a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Consumer {
    /// Its name, as it calls itself.
    pub name: String,
    /// Who reported or watches, for example `Workload::"orders"`.
    pub principal: String,
    /// The version that it last said it runs on.
    pub version_id: Option<VersionId>,
    /// Since when, by its first report of that version.
    pub since: Option<Timestamp>,
    /// When it last reported.
    pub reported_at: Option<Timestamp>,
    /// That version is current.
    pub current: bool,
    /// It watches the secret now.
    pub watching: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[test]
    fn a_secret_is_pointed_at_in_many_ways() {
        let shown = |reference: Result<Reference, ClientError>| reference.unwrap().to_string();
        assert_eq!(shown("staging:db#password".to_reference()), "staging:db#password");
        assert_eq!(shown(String::from("db").to_reference()), "db");
        assert_eq!(shown(("db", "password").to_reference()), "db#password");
        assert_eq!(shown(("db", String::from("a.b")).to_reference()), "db#a.b");
        let name = SecretName::parse("db").unwrap();
        assert_eq!(shown(name.to_reference()), "db");
        assert_eq!(shown(SecretId::parse("staging", "db").unwrap().to_reference()), "staging:db");
        assert_eq!("a//b".to_reference().unwrap_err().reason, Reason::InvalidName);
        assert_eq!(("db", "a b").to_reference().unwrap_err().reason, Reason::InvalidField);
    }
}
