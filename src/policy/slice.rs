//! Which policies can have a say: those whose scope fits the question. The others would evaluate to false whatever
//! their conditions, so leaving them out changes no decision, and ten thousand policies cost as much as those few.
//!
//! ```text
//! permit ( principal in Group::"team",   action in [Action::"read"],   resource in Environment::"staging" ) when …
//!          └─ found by the principal's    └─ a bit per action           └─ found by the resource's own id, its
//!             own id, its groups, its                                      environment, its type, or because it
//!             type, or because it is open                                  is open
//! ```

use std::collections::HashMap;

use cedar_policy::{
    ActionConstraint, EntityTypeName, EntityUid, Policy, PrincipalConstraint, ResourceConstraint,
};

use super::Action;
use super::entities::{Party, Vocabulary};

/// What a policy's head demands.
pub(super) struct Scope {
    pub(super) principal: Constraint,
    /// A bit per action, in the order of [`Action::ALL`].
    actions: u16,
    pub(super) resource: Constraint,
}

/// What a policy's head demands of the principal or of the resource.
pub(super) enum Constraint {
    Any,
    Is(EntityTypeName),
    Eq(EntityUid),
    In(EntityUid),
    IsIn(EntityTypeName, EntityUid),
}

impl Constraint {
    /// Exactly when Cedar finds the constraint true.
    pub(super) fn holds(&self, party: &Party) -> bool {
        match self {
            Self::Any => true,
            Self::Is(entity_type) => party.is(entity_type),
            Self::Eq(uid) => party.uid == *uid,
            Self::In(uid) => party.is_in(uid),
            Self::IsIn(entity_type, uid) => party.is(entity_type) && party.is_in(uid),
        }
    }
}

impl From<PrincipalConstraint> for Constraint {
    fn from(constraint: PrincipalConstraint) -> Self {
        match constraint {
            PrincipalConstraint::Any => Self::Any,
            PrincipalConstraint::Is(entity_type) => Self::Is(entity_type),
            PrincipalConstraint::Eq(uid) => Self::Eq(uid),
            PrincipalConstraint::In(uid) => Self::In(uid),
            PrincipalConstraint::IsIn(entity_type, uid) => Self::IsIn(entity_type, uid),
        }
    }
}

impl From<ResourceConstraint> for Constraint {
    fn from(constraint: ResourceConstraint) -> Self {
        match constraint {
            ResourceConstraint::Any => Self::Any,
            ResourceConstraint::Is(entity_type) => Self::Is(entity_type),
            ResourceConstraint::Eq(uid) => Self::Eq(uid),
            ResourceConstraint::In(uid) => Self::In(uid),
            ResourceConstraint::IsIn(entity_type, uid) => Self::IsIn(entity_type, uid),
        }
    }
}

impl Scope {
    pub(super) fn of(policy: &Policy, vocabulary: &Vocabulary) -> Self {
        let constraint = policy.action_constraint();
        let admits = |action: Action| {
            vocabulary.action(action).is_some_and(|party| match &constraint {
                ActionConstraint::Any => true,
                ActionConstraint::Eq(uid) => party.uid == *uid,
                ActionConstraint::In(uids) => uids.iter().any(|uid| party.is_in(uid)),
            })
        };
        Self {
            principal: policy.principal_constraint().into(),
            actions: Action::ALL.iter().filter(|action| admits(**action)).map(|action| bit(*action)).sum(),
            resource: policy.resource_constraint().into(),
        }
    }

    /// Whether it gives every action there is.
    pub(super) fn all_actions(&self) -> bool {
        Action::ALL.iter().all(|action| self.admits(*action))
    }

    /// Exactly when Cedar finds the head true.
    pub(super) fn fits(&self, principal: &Party, action: Action, resource: &Party) -> bool {
        self.admits(action) && self.principal.holds(principal) && self.resource.holds(resource)
    }

    /// Whether it gives this action.
    pub(super) fn admits(&self, action: Action) -> bool {
        self.actions & bit(action) != 0
    }
}

const _: () = assert!(Action::ALL.len() <= 16, "a scope has a bit for every action");

const fn bit(action: Action) -> u16 {
    1 << action as u16
}

/// Policies by what their heads name. Numbers are positions in the rule set.
#[derive(Default)]
pub(super) struct Index {
    by_principal: Side,
    by_resource: Side,
}

impl Index {
    pub(super) fn insert(&mut self, number: u32, scope: &Scope) {
        self.by_principal.insert(&scope.principal, number);
        self.by_resource.insert(&scope.resource, number);
    }

    /// Every policy whose scope can fit, and some that don't: the shorter of the two sides.
    pub(super) fn candidates(&self, principal: &Party, resource: &Party) -> impl Iterator<Item = u32> {
        let sides = [self.by_principal.lists(principal), self.by_resource.lists(resource)];
        let length = |lists: &Vec<&Vec<u32>>| lists.iter().map(|list| list.len()).sum::<usize>();
        sides.into_iter().min_by_key(length).into_iter().flatten().flatten().copied()
    }
}

/// One side of the heads. A policy is on exactly one of the lists.
#[derive(Default)]
struct Side {
    open: Vec<u32>,
    types: HashMap<EntityTypeName, Vec<u32>>,
    entities: HashMap<EntityUid, Vec<u32>>,
}

impl Side {
    fn insert(&mut self, constraint: &Constraint, number: u32) {
        let list = match constraint {
            Constraint::Any => &mut self.open,
            Constraint::Is(entity_type) => self.types.entry(entity_type.clone()).or_default(),
            Constraint::Eq(uid) | Constraint::In(uid) | Constraint::IsIn(_, uid) => {
                self.entities.entry(uid.clone()).or_default()
            }
        };
        list.push(number);
    }

    /// Every list with a policy on it that can hold for this party.
    fn lists(&self, party: &Party) -> Vec<&Vec<u32>> {
        let own = [Some(&self.open), self.types.get(party.uid.type_name()), self.entities.get(&party.uid)];
        let above = party.parents.iter().filter_map(|uid| self.entities.get(uid));
        own.into_iter().flatten().chain(above).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use cedar_policy::{PolicyId, Schema};

    use super::*;
    use crate::policy::SHIPPED;

    static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(|| {
        let schema = SHIPPED.iter().find(|(name, _)| *name == "schema.cedarschema").unwrap().1;
        Vocabulary::of(&Schema::from_cedarschema_str(schema).unwrap().0).unwrap()
    });

    fn scope(head: &str) -> Scope {
        let policy = Policy::parse(Some(PolicyId::new("x")), format!("permit ({head});")).unwrap();
        Scope::of(&policy, &VOCABULARY)
    }

    fn party(uid: &str, parents: &[&str]) -> Party {
        let parents = parents.iter().map(|parent| parent.parse().unwrap()).collect();
        Party { uid: uid.parse().unwrap(), parents }
    }

    fn ana() -> Party {
        party("User::\"ana\"", &["Group::\"team\"", "Group::\"leads\""])
    }

    fn database() -> Party {
        party("Secret::\"staging:database\"", &["Environment::\"staging\""])
    }

    #[test]
    fn heads_fit_as_cedar_reads_them() {
        for (head, fits) in [
            ("principal, action, resource", true),
            ("principal is User, action, resource is Secret", true),
            ("principal is Workload, action, resource", false),
            ("principal == User::\"ana\", action, resource", true),
            ("principal == User::\"Ana\", action, resource", false),
            ("principal in User::\"ana\", action, resource", true),
            ("principal in Group::\"leads\", action, resource", true),
            ("principal in Group::\"leads \", action, resource", false),
            ("principal == Group::\"leads\", action, resource", false),
            ("principal is User in Group::\"team\", action, resource", true),
            ("principal is Workload in Group::\"team\", action, resource", false),
            ("principal, action == Action::\"read\", resource", true),
            ("principal, action in Action::\"read\", resource", true),
            ("principal, action in [Action::\"write\", Action::\"read\"], resource", true),
            ("principal, action in [Action::\"write\", Action::\"list\"], resource", false),
            ("principal, action, resource in Environment::\"staging\"", true),
            ("principal, action, resource in Environment::\"production\"", false),
            ("principal, action, resource == Environment::\"staging\"", false),
            ("principal, action, resource is Environment in Environment::\"staging\"", false),
            ("principal, action, resource == Secret::\"staging:database\"", true),
            ("principal, action, resource == Secret::\"staging:databas\"", false),
        ] {
            assert_eq!(scope(head).fits(&ana(), Action::Read, &database()), fits, "{head}");
        }
    }

    #[test]
    fn the_index_finds_whatever_fits_and_looks_at_the_shorter_side() {
        let heads: Vec<String> = (0..100)
            .map(|number| {
                format!(
                    "principal in Group::\"g{number}\", action, resource in Environment::\"e{}\"",
                    number % 10
                )
            })
            .chain([
                "principal in Group::\"team\", action, resource".to_owned(),
                "principal, action, resource in Environment::\"e1\"".to_owned(),
            ])
            .collect();
        let scopes: Vec<Scope> = heads.iter().map(|head| scope(head)).collect();
        let mut index = Index::default();
        for (number, scope) in (0..).zip(&scopes) {
            index.insert(number, scope);
        }
        let found = |principal: &Party, resource: &Party| {
            let mut found: Vec<u32> = index.candidates(principal, resource).collect();
            found.sort_unstable();
            found
        };
        let g7 = party("User::\"u\"", &["Group::\"g7\""]);
        assert_eq!(found(&g7, &party("Environment::\"e7\"", &[])), [7, 101]);
        assert_eq!(found(&ana(), &party("Environment::\"nowhere\"", &[])), [100]);
        let everyone: Vec<String> = (0..100).map(|number| format!("Group::\"g{number}\"")).collect();
        let everyone = party("User::\"u\"", &everyone.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(found(&everyone, &party("Environment::\"e3\"", &[])).len(), 11);
    }

    #[test]
    fn all_actions_are_all_actions() {
        assert!(scope("principal, action, resource").all_actions());
        assert!(!scope("principal, action == Action::\"read\", resource").all_actions());
    }
}
