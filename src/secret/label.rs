//! Staging labels and the rules by which they move. Pure: a [`Labels`] in, a [`Labels`] out.
//!
//! ```text
//!            put(labels = none)                    move AWSCURRENT v1 → v2
//!   (nothing) ─────────────────▶ v1 AWSCURRENT ─────────────────────────────▶ v1 AWSPREVIOUS, v2 AWSCURRENT
//! ```
//!
//! Invariants, kept by construction and by [`Labels::put`] and [`Labels::apply`]:
//! - a label lives on one version (the map's key is the label);
//! - once a secret has a version, exactly one carries AWSCURRENT;
//! - at most one carries AWSPENDING, and a claim on it is never stolen: it must be moved away by name first,
//!   unless its holder has become current;
//! - AWSPREVIOUS is the last AWSCURRENT: it moves only with it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::name::{first_refused, shown};
use super::version::VersionId;
use crate::error::{Reason, Reasoned};

/// How many labels one version may carry (AWS Secrets Manager quotas).
pub const MAX_LABELS_PER_VERSION: usize = 20;
const MAX_LABEL: usize = 256;

/// A name that points at one version.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Label {
    /// The version in use.
    Current,
    /// The version that a rotation is about to bring into use.
    Pending,
    /// The version that was in use before.
    Previous,
    /// A label of the user's own.
    Custom(CustomLabel),
}

/// The text of a user's own label; made only by [`Label::parse`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CustomLabel(Box<str>);

impl Label {
    /// Parses a label: `AWSCURRENT`, `AWSPENDING`, `AWSPREVIOUS`, or 1–256 of `A-Za-z0-9/_+=.@-` that don't start
    /// with `AWS`, which is the system's own.
    ///
    /// # Errors
    /// [`Reason::InvalidLabel`].
    pub fn parse(text: &str) -> Result<Self, LabelError> {
        let refuse = |problem: String| Err(LabelError::Invalid { label: shown(text), problem });
        match text {
            "AWSCURRENT" => return Ok(Self::Current),
            "AWSPENDING" => return Ok(Self::Pending),
            "AWSPREVIOUS" => return Ok(Self::Previous),
            "" => return refuse("is empty".to_owned()),
            _ => {}
        }
        if text.len() > MAX_LABEL {
            return refuse(format!("is {} bytes long; at most {MAX_LABEL} are permitted", text.len()));
        }
        let permitted = |c: char| c.is_ascii_alphanumeric() || "/_+=.@-".contains(c);
        if let Some((position, c)) = first_refused(text, permitted) {
            let c = shown(c.encode_utf8(&mut [0; 4]));
            return refuse(format!("character {position} ({c}) is not one of A-Z, a-z, 0-9 and /_+=.@-"));
        }
        if text.starts_with("AWS") {
            return refuse(
                "starts with `AWS` and is none of AWSCURRENT, AWSPENDING and AWSPREVIOUS".to_owned(),
            );
        }
        Ok(Self::Custom(CustomLabel(text.into())))
    }

    /// The label as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Current => "AWSCURRENT",
            Self::Pending => "AWSPENDING",
            Self::Previous => "AWSPREVIOUS",
            Self::Custom(text) => &text.0,
        }
    }

    /// Whether the system moves this label, and a user may not.
    #[must_use]
    pub const fn is_system(&self) -> bool {
        !matches!(self, Self::Custom(_))
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        Self::parse(text)
    }
}

impl serde::Serialize for Label {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for Label {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Why labels were not moved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LabelError {
    /// The text is not a label.
    #[error("label {label}: {problem}")]
    Invalid {
        /// What was given, escaped.
        label: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Someone moved the label first, or the caller's picture was wrong.
    #[error("label {label} is on {found}, not on {expected}; describe the secret and try again")]
    Moved {
        /// The label.
        label: Label,
        /// Where it is (`no version` where nowhere).
        found: String,
        /// Where the caller thought it was.
        expected: String,
    },
    /// AWSPENDING is another version's claim.
    #[error(
        "AWSPENDING is on version {holder}, another change in progress; finish it or move the label away first"
    )]
    PendingHeld {
        /// The version that holds the claim.
        holder: VersionId,
    },
    /// The move would break a rule whatever the caller's picture.
    #[error("label {label}: {problem}")]
    Forbidden {
        /// The label.
        label: Label,
        /// The rule.
        problem: &'static str,
    },
    /// The version would carry too many labels.
    #[error("version {version} would carry more than {MAX_LABELS_PER_VERSION} labels; remove one first")]
    TooMany {
        /// The version.
        version: VersionId,
    },
}

impl Reasoned for LabelError {
    fn reason(&self) -> Reason {
        match self {
            Self::Invalid { .. } | Self::Forbidden { .. } => Reason::InvalidLabel,
            Self::Moved { .. } | Self::PendingHeld { .. } => Reason::Conflict,
            Self::TooMany { .. } => Reason::LimitExceeded,
        }
    }
}

/// A compare-and-swap of one label: `from` is where the caller saw it (`None`: on no version), `to` is where it goes
/// (`None`: away).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelMove {
    /// The label.
    pub label: Label,
    /// Where the caller saw it.
    pub from: Option<VersionId>,
    /// Where it goes.
    pub to: Option<VersionId>,
}

/// Which version carries each label of one secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Labels(BTreeMap<Label, VersionId>);

impl Labels {
    /// The version that carries `label`.
    #[must_use]
    pub fn holder(&self, label: &Label) -> Option<&VersionId> {
        self.0.get(label)
    }

    /// The labels that `version` carries, sorted.
    #[must_use]
    pub fn of(&self, version: &VersionId) -> Vec<Label> {
        self.0.iter().filter(|(_, holder)| *holder == version).map(|(label, _)| label.clone()).collect()
    }

    /// Every label with its version.
    pub fn iter(&self) -> impl Iterator<Item = (&Label, &VersionId)> {
        self.0.iter()
    }

    /// The labels after a new version was written that asks for `wanted`. Asking for nothing means AWSCURRENT, and
    /// so does the first version of a secret whatever it asks for.
    ///
    /// # Errors
    /// [`LabelError::PendingHeld`] where AWSPENDING is someone else's claim, [`LabelError::Forbidden`] where
    /// AWSPREVIOUS is asked for, [`LabelError::TooMany`].
    pub fn put(&self, version: &VersionId, wanted: &[Label]) -> Result<Self, LabelError> {
        let mut next = self.clone();
        let first = self.0.is_empty();
        if first && !wanted.is_empty() && !wanted.contains(&Label::Current) {
            return Err(LabelError::Forbidden {
                label: Label::Current,
                problem: "the first version of a secret carries it; put a current value first",
            });
        }
        for label in wanted {
            match label {
                Label::Current => {}
                Label::Previous => return Err(previous_is_the_systems()),
                Label::Pending => next.claim_pending(version)?,
                Label::Custom(_) => {
                    next.0.insert(label.clone(), version.clone());
                }
            }
        }
        if wanted.is_empty() || wanted.contains(&Label::Current) {
            next.promote(version);
        }
        next.within_bounds(version)
    }

    /// The labels after `change`. A move to where the label already is changes nothing and succeeds, so that a
    /// retry after a lost answer is harmless.
    ///
    /// # Errors
    /// [`LabelError::Moved`] where `from` is not where the label is; [`LabelError::Forbidden`] for a move that
    /// would leave a secret without AWSCURRENT or moves AWSPREVIOUS by itself; [`LabelError::PendingHeld`];
    /// [`LabelError::TooMany`].
    pub fn apply(&self, change: &LabelMove) -> Result<Self, LabelError> {
        let found = self.holder(&change.label);
        if change.label == Label::Previous {
            return Err(previous_is_the_systems());
        }
        if found == change.to.as_ref() {
            return Ok(self.clone());
        }
        if found != change.from.as_ref() {
            return Err(LabelError::Moved {
                label: change.label.clone(),
                found: place(found),
                expected: place(change.from.as_ref()),
            });
        }
        let mut next = self.clone();
        match (&change.label, &change.to) {
            (Label::Current, None) => {
                return Err(LabelError::Forbidden {
                    label: Label::Current,
                    problem: "a secret always has a current version; move it to another one",
                });
            }
            (Label::Current, Some(to)) => next.promote(to),
            (label, None) => {
                next.0.remove(label);
            }
            (label, Some(to)) => {
                next.0.insert(label.clone(), to.clone());
            }
        }
        match &change.to {
            Some(to) => next.within_bounds(to),
            None => Ok(next),
        }
    }

    /// The labels after a pending version came into use: AWSCURRENT moves from `from` to `to`, and AWSPENDING, which
    /// must be on `to`, goes in the same step. So whoever comes late with the same move, after someone moved AWSCURRENT
    /// back, finds the claim spent. Where `to` is current already, nothing but a claim of its own is removed.
    ///
    /// # Errors
    /// [`LabelError::Moved`] where either label is elsewhere; [`LabelError::TooMany`].
    pub fn finish(&self, from: &VersionId, to: &VersionId) -> Result<Self, LabelError> {
        let pending = self.holder(&Label::Pending);
        let is_current = self.holder(&Label::Current) == Some(to);
        if pending != Some(to) && !is_current {
            let (found, expected) = (place(pending), place(Some(to)));
            return Err(LabelError::Moved { label: Label::Pending, found, expected });
        }
        let change = LabelMove { label: Label::Current, from: Some(from.clone()), to: Some(to.clone()) };
        // The claim goes first: its place may be the one that AWSCURRENT needs.
        let mut next = self.clone();
        if pending == Some(to) {
            next.0.remove(&Label::Pending);
        }
        next.apply(&change)
    }

    fn promote(&mut self, version: &VersionId) {
        let last = self.0.insert(Label::Current, version.clone());
        if let Some(last) = last.filter(|last| last != version) {
            self.0.insert(Label::Previous, last);
        }
    }

    fn claim_pending(&mut self, version: &VersionId) -> Result<(), LabelError> {
        let current = self.holder(&Label::Current);
        match self.holder(&Label::Pending) {
            Some(holder) if holder != version && Some(holder) != current => {
                Err(LabelError::PendingHeld { holder: holder.clone() })
            }
            _ => {
                self.0.insert(Label::Pending, version.clone());
                Ok(())
            }
        }
    }

    fn within_bounds(self, version: &VersionId) -> Result<Self, LabelError> {
        if self.of(version).len() > MAX_LABELS_PER_VERSION {
            return Err(LabelError::TooMany { version: version.clone() });
        }
        Ok(self)
    }
}

fn previous_is_the_systems() -> LabelError {
    LabelError::Forbidden {
        label: Label::Previous,
        problem: "is always the last current version and moves only with AWSCURRENT",
    }
}

fn place(holder: Option<&VersionId>) -> String {
    holder.map_or_else(|| "no version".to_owned(), |id| format!("version {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u8) -> VersionId {
        VersionId::parse(&format!("{n:032}")).unwrap()
    }

    fn to(label: Label, from: Option<u8>, to: Option<u8>) -> LabelMove {
        LabelMove { label, from: from.map(id), to: to.map(id) }
    }

    #[test]
    fn the_first_version_is_current() {
        let labels = Labels::default().put(&id(1), &[]).unwrap();
        assert_eq!(labels.of(&id(1)), [Label::Current]);
        let error = Labels::default().put(&id(1), &[Label::Pending]).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidLabel);
    }

    #[test]
    fn previous_follows_current_also_on_rollback() {
        let labels = Labels::default().put(&id(1), &[]).unwrap().put(&id(2), &[]).unwrap();
        assert_eq!(labels.holder(&Label::Previous), Some(&id(1)));
        let back = labels.apply(&to(Label::Current, Some(2), Some(1))).unwrap();
        assert_eq!(back.holder(&Label::Current), Some(&id(1)));
        assert_eq!(back.holder(&Label::Previous), Some(&id(2)));
    }

    #[test]
    fn a_stale_picture_changes_nothing() {
        let labels = Labels::default().put(&id(1), &[]).unwrap().put(&id(2), &[]).unwrap();
        let error = labels.apply(&to(Label::Current, Some(1), Some(3))).unwrap_err();
        assert_eq!(error.reason(), Reason::Conflict);
        assert!(
            labels.apply(&to(Label::Current, Some(1), Some(2))).unwrap() == labels,
            "a retry is harmless"
        );
    }

    #[test]
    fn a_pending_claim_is_not_stolen() {
        let labels = Labels::default().put(&id(1), &[]).unwrap().put(&id(2), &[Label::Pending]).unwrap();
        let error = labels.put(&id(3), &[Label::Pending]).unwrap_err();
        assert_eq!(error, LabelError::PendingHeld { holder: id(2) });
        let promoted = labels.apply(&to(Label::Current, Some(1), Some(2))).unwrap();
        assert!(promoted.put(&id(3), &[Label::Pending]).is_ok(), "a claim that became current is over");
    }

    #[test]
    fn a_promotion_spends_its_claim() {
        let stable = Label::parse("stable").unwrap();
        let labels = Labels::default().put(&id(1), &[Label::Current, stable.clone()]).unwrap();
        let labels = labels.put(&id(2), &[Label::Pending]).unwrap();
        let finished = labels.finish(&id(1), &id(2)).unwrap();
        let expected = [(Label::Current, id(2)), (Label::Previous, id(1)), (stable, id(1))];
        assert_eq!(finished.0, BTreeMap::from(expected));
        assert_eq!(finished.finish(&id(1), &id(2)).unwrap(), finished, "a retry is harmless");
        let by_hand = labels.apply(&to(Label::Current, Some(1), Some(2))).unwrap();
        assert_eq!(
            by_hand.finish(&id(1), &id(2)).unwrap(),
            finished,
            "of what is current, only the claim goes"
        );
    }

    #[test]
    fn a_promotion_without_its_claim_is_refused() {
        let pending = |error: LabelError| {
            assert_eq!(error.reason(), Reason::Conflict);
            matches!(error, LabelError::Moved { label: Label::Pending, .. })
        };
        assert!(pending(Labels::default().finish(&id(1), &id(2)).unwrap_err()));
        let labels = Labels::default().put(&id(1), &[]).unwrap().put(&id(2), &[Label::Pending]).unwrap();
        assert!(pending(labels.finish(&id(1), &id(3)).unwrap_err()), "another's claim");
        let finished = labels.finish(&id(1), &id(2)).unwrap();
        let rolled_back = finished.apply(&to(Label::Current, Some(2), Some(1))).unwrap();
        assert!(pending(rolled_back.finish(&id(1), &id(2)).unwrap_err()), "late: the claim was spent");
        let overtaken = labels.put(&id(4), &[]).unwrap();
        let error = overtaken.finish(&id(1), &id(2)).unwrap_err();
        assert!(matches!(error, LabelError::Moved { label: Label::Current, .. }), "{error}");
        assert!(!pending(error), "the claim holds, but someone was first");
    }

    #[test]
    fn aws_labels_are_reserved() {
        assert_eq!(Label::parse("AWSOTHER").unwrap_err().reason(), Reason::InvalidLabel);
        assert!(Label::parse("stable").is_ok());
        assert!(Labels::default().put(&id(1), &[Label::Current, Label::Previous]).is_err());
    }

    #[test]
    fn a_version_carries_at_most_twenty() {
        let mut labels = Labels::default().put(&id(1), &[]).unwrap();
        for n in 0..19 {
            let label = Label::parse(&format!("l{n}")).unwrap();
            labels = labels.apply(&LabelMove { label, from: None, to: Some(id(1)) }).unwrap();
        }
        let error = labels.apply(&to(Label::parse("more").unwrap(), None, Some(1))).unwrap_err();
        assert_eq!(error.reason(), Reason::LimitExceeded);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u8, Vec<Label>),
        Move(Label, Option<u8>, Option<u8>),
        Finish(u8, u8),
    }

    impl Step {
        /// What becomes of the labels; `None` where it is refused.
        fn of(&self, labels: &Labels) -> Option<Labels> {
            match self {
                Self::Put(version, wanted) => labels.put(&id(*version), wanted).ok(),
                // Where there is no version, there is nothing to move to.
                Self::Move(..) if labels.0.is_empty() => None,
                Self::Move(label, from, into) => labels.apply(&to(label.clone(), *from, *into)).ok(),
                Self::Finish(from, into) => labels.finish(&id(*from), &id(*into)).ok(),
            }
        }
    }

    fn any_label() -> impl Strategy<Value = Label> {
        prop_oneof![
            Just(Label::Current),
            Just(Label::Pending),
            Just(Label::Previous),
            Just(Label::parse("stable").unwrap()),
            Just(Label::parse("canary").unwrap()),
        ]
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let version = 0u8..6;
        prop_oneof![
            (version.clone(), proptest::collection::vec(any_label(), 0..3))
                .prop_map(|(v, l)| Step::Put(v, l)),
            (any_label(), proptest::option::of(version.clone()), proptest::option::of(version.clone()))
                .prop_map(|(l, f, t)| Step::Move(l, f, t)),
            (version.clone(), version).prop_map(|(f, t)| Step::Finish(f, t)),
        ]
    }

    proptest! {
        /// The state machine under any sequence of steps: refused steps change nothing, accepted ones keep the rules.
        #[test]
        fn rules_hold_after_any_steps(steps in proptest::collection::vec(any_step(), 1..40)) {
            let mut labels = Labels::default();
            for step in steps {
                let before = labels.clone();
                let Some(next) = step.of(&labels) else { continue };
                prop_assert!(next.holder(&Label::Current).is_some());
                if next.holder(&Label::Current) != before.holder(&Label::Current) {
                    prop_assert_eq!(next.holder(&Label::Previous), before.holder(&Label::Current));
                } else {
                    prop_assert_eq!(next.holder(&Label::Previous), before.holder(&Label::Previous));
                }
                prop_assert_ne!(next.holder(&Label::Current), next.holder(&Label::Previous));
                if let (Some(was), Step::Put(version, _)) = (before.holder(&Label::Pending), &step) {
                    let stolen = next.holder(&Label::Pending) != Some(was);
                    prop_assert!(!stolen || Some(was) == before.holder(&Label::Current) || was == &id(*version));
                }
                labels = next;
            }
        }

        /// Whatever the labels are: both moves or neither, and once.
        #[test]
        fn a_promotion_is_two_moves_in_one(
            steps in proptest::collection::vec(any_step(), 1..40),
            from in 0u8..6,
            into in 0u8..6,
        ) {
            let labels = steps.iter().fold(Labels::default(), |labels, step| step.of(&labels).unwrap_or(labels));
            let is_claimed = labels.holder(&Label::Pending) == Some(&id(into));
            let current = labels.holder(&Label::Current);
            let may = current == Some(&id(into)) || (is_claimed && current == Some(&id(from)));
            let finished = labels.finish(&id(from), &id(into));
            prop_assert_eq!(finished.is_ok(), may);
            if let Ok(finished) = finished {
                let moved = labels.apply(&to(Label::Current, Some(from), Some(into))).unwrap();
                let spent = if is_claimed {
                    moved.apply(&to(Label::Pending, Some(into), None)).unwrap()
                } else {
                    moved
                };
                prop_assert_eq!(&finished, &spent);
                prop_assert_ne!(finished.holder(&Label::Pending), Some(&id(into)));
                prop_assert_eq!(finished.finish(&id(from), &id(into)), Ok(spent));
            }
        }
    }
}
