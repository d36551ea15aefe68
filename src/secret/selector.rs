//! Which version of a secret is meant.

use std::fmt;

use super::label::Label;
use super::version::VersionId;

/// One way to point at a version: by the label that it carries, or by its id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Selector {
    /// The version that carries this label.
    Label(Label),
    /// The version with this id, labelled or not.
    Version(VersionId),
}

impl Selector {
    /// What a caller means who says nothing: AWSCURRENT.
    pub const CURRENT: Self = Self::Label(Label::Current);
}

impl Default for Selector {
    fn default() -> Self {
        Self::CURRENT
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "label {label}"),
            Self::Version(id) => write!(f, "version {id}"),
        }
    }
}
