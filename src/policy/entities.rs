//! What Cedar is told: a principal and a resource as entities, made of the caller's proof and the configuration alone.
//!
//! ```text
//! Group ◀── in ── User, Workload    tags: the claims
//! Environment ◀── in ── Secret      attributes: environment, protected; of a secret also name, folders
//! ```

use std::collections::HashSet;

use cedar_policy::{
    Context as CedarContext, Entities, Entity, EntityId, EntityTypeName, EntityUid, Request,
    RestrictedExpression, Schema,
};

use super::{Action, Context, Resource};
use crate::environment::Registry;
use crate::identity::{Principal, PrincipalKind};
use crate::secret::EnvironmentName;

/// The broker's own id among environments; no environment can have this name.
pub(super) const BROKER: &str = "claviger";

/// The entity types and actions that the broker speaks of, as the schema declares them.
pub(super) struct Vocabulary {
    user: EntityTypeName,
    workload: EntityTypeName,
    group: EntityTypeName,
    environment: EntityTypeName,
    secret: EntityTypeName,
    /// In the order of [`Action::ALL`], each with the action groups that it is in.
    actions: Vec<Party>,
}

/// One side of a question: an entity with everything that it is below.
pub(super) struct Party {
    pub(super) uid: EntityUid,
    pub(super) parents: HashSet<EntityUid>,
}

impl Party {
    fn new(entity_type: &EntityTypeName, id: &str, parents: impl IntoIterator<Item = EntityUid>) -> Self {
        let uid = EntityUid::from_type_name_and_id(entity_type.clone(), EntityId::new(id));
        Self { uid, parents: parents.into_iter().collect() }
    }

    /// Cedar's `is`.
    pub(super) fn is(&self, entity_type: &EntityTypeName) -> bool {
        self.uid.type_name() == entity_type
    }

    /// Cedar's `in`: equal to it, or below it.
    pub(super) fn is_in(&self, uid: &EntityUid) -> bool {
        self.uid == *uid || self.parents.contains(uid)
    }
}

/// Who wants to do what, to what, and why: all that a decision depends on.
#[derive(Clone, Copy)]
pub(super) struct Question<'a> {
    pub(super) principal: &'a Principal,
    pub(super) action: Action,
    pub(super) resource: &'a Resource,
    pub(super) context: &'a Context,
}

/// The two sides of a question, as the index wants them.
pub(super) struct Sides {
    pub(super) principal: Party,
    pub(super) resource: Party,
}

/// A question as Cedar wants it.
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) entities: Entities,
}

impl Vocabulary {
    /// Finds the broker's words in a schema, and checks that what the broker supplies conforms to the schema: no
    /// policy may be valid that relies on what is never there. An error says what the schema does wrong.
    pub(super) fn of(schema: &Schema) -> Result<Self, String> {
        let entity_type = |name: &str| {
            let found = schema.entity_types().find(|declared| declared.to_string() == name);
            found
                .cloned()
                .ok_or_else(|| format!("declares no entity type `{name}`; start from the shipped schema"))
        };
        let vocabulary = Self {
            user: entity_type("User")?,
            workload: entity_type("Workload")?,
            group: entity_type("Group")?,
            environment: entity_type("Environment")?,
            secret: entity_type("Secret")?,
            actions: Action::ALL.iter().map(|action| declared(*action, schema)).collect::<Result<_, _>>()?,
        };
        vocabulary.fits(schema).map_err(|problem| {
            format!("does not fit what the broker tells policies ({problem}); start from the shipped schema")
        })?;
        Ok(vocabulary)
    }

    /// Puts one of everything that is ever supplied through the schema's own conformance checks.
    fn fits(&self, schema: &Schema) -> Result<(), String> {
        let group = self.group("group");
        let user = Party::new(&self.user, "id", [group.clone()]);
        let workload = Party::new(&self.workload, "id", [group.clone()]);
        let environment = self.environment(BROKER);
        let secret = self.secret("environment", "folder/name");
        let supplied = [
            Entity::with_uid(group),
            principal_entity(&user, [("claim", "value")])?,
            principal_entity(&workload, [("claim", "value")])?,
            environment_entity(&environment, BROKER, true)?,
            secret_entity(&secret, "environment", "folder/name", false)?,
        ];
        Entities::from_entities(supplied, Some(schema)).map_err(said)?;
        for (principal, resource) in
            [(&user, &environment), (&user, &secret), (&workload, &environment), (&workload, &secret)]
        {
            for action in &self.actions {
                for context in [context(None)?, context(Some("reason"))?] {
                    request(principal, action, resource, context, Some(schema))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn is_environment(&self, uid: &EntityUid) -> bool {
        *uid.type_name() == self.environment
    }

    pub(super) fn is_secret(&self, uid: &EntityUid) -> bool {
        *uid.type_name() == self.secret
    }

    pub(super) fn action(&self, action: Action) -> Option<&Party> {
        self.actions.get(action as usize)
    }

    fn principal(&self, principal: &Principal) -> Party {
        let entity_type = match principal.kind() {
            PrincipalKind::User => &self.user,
            PrincipalKind::Workload => &self.workload,
        };
        Party::new(entity_type, principal.id(), principal.groups().iter().map(|group| self.group(group)))
    }

    pub(super) fn resource(&self, resource: &Resource) -> Party {
        match resource {
            Resource::Broker => self.environment(BROKER),
            Resource::Environment(name) => self.environment(name.as_str()),
            Resource::Secret(id) => self.secret(id.environment.as_str(), id.name.as_str()),
        }
    }

    /// Who wants it, and what it is.
    pub(super) fn sides(&self, question: Question<'_>) -> Sides {
        Sides { principal: self.principal(question.principal), resource: self.resource(question.resource) }
    }

    /// Builds the request and the entities that it speaks of: the principal, the action and the resource. No other
    /// entity can matter, because policies are validated to look no further.
    pub(super) fn ask(
        &self,
        question: Question<'_>,
        sides: &Sides,
        registry: &Registry,
    ) -> Result<Asked, String> {
        let Sides { principal, resource } = sides;
        let claims = question.principal.claims().iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let resource_entity = match question.resource {
            Resource::Broker => environment_entity(resource, BROKER, true),
            Resource::Environment(name) => {
                environment_entity(resource, name.as_str(), protects(registry, name))
            }
            Resource::Secret(id) => {
                let protected = protects(registry, &id.environment);
                secret_entity(resource, id.environment.as_str(), id.name.as_str(), protected)
            }
        }?;
        let stated = context(stated(question.context))?;
        self.put(question.action, sides, stated, [principal_entity(principal, claims)?, resource_entity])
    }

    /// As [`ask`](Self::ask), for policies that are nothing but heads: those look at what the two sides are and what
    /// they are in, so neither attributes nor the context are built.
    pub(super) fn ask_heads(&self, question: Question<'_>, sides: &Sides) -> Result<Asked, String> {
        let bare = |party: &Party| Entity::new_no_attrs(party.uid.clone(), party.parents.clone());
        let entities = [bare(&sides.principal), bare(&sides.resource)];
        self.put(question.action, sides, CedarContext::empty(), entities)
    }

    fn put(
        &self,
        action: Action,
        sides: &Sides,
        context: CedarContext,
        [principal, resource]: [Entity; 2],
    ) -> Result<Asked, String> {
        let action = self.action(action).ok_or("the schema lost an action")?;
        let request = request(&sides.principal, action, &sides.resource, context, None)?;
        let action = Entity::new_no_attrs(action.uid.clone(), action.parents.clone());
        let entities = Entities::from_entities([principal, action, resource], None).map_err(said)?;
        Ok(Asked { request, entities })
    }

    fn group(&self, name: &str) -> EntityUid {
        EntityUid::from_type_name_and_id(self.group.clone(), EntityId::new(name))
    }

    fn environment(&self, name: &str) -> Party {
        Party::new(&self.environment, name, [])
    }

    /// A secret's id is `environment:name`, which no two share: an environment's name has no colon.
    fn secret(&self, environment: &str, name: &str) -> Party {
        Party::new(&self.secret, &format!("{environment}:{name}"), [self.environment(environment).uid])
    }
}

/// Whether an environment is protected. One that is not declared is: nobody said that it needn't be.
pub(super) fn protects(registry: &Registry, name: &EnvironmentName) -> bool {
    !registry.get(name).is_ok_and(|environment| !environment.protected)
}

fn declared(action: Action, schema: &Schema) -> Result<Party, String> {
    let named =
        |uid: &&EntityUid| uid.type_name().to_string() == "Action" && uid.id().unescaped() == action.as_str();
    let uid = schema
        .actions()
        .find(named)
        .ok_or_else(|| format!("declares no action `{action}`; start from the shipped schema"))?;
    let groups = schema.action_entities().map_err(said)?;
    let parents = groups.ancestors(uid).map_or_else(HashSet::new, |above| above.cloned().collect());
    Ok(Party { uid: uid.clone(), parents })
}

fn request(
    principal: &Party,
    action: &Party,
    resource: &Party,
    context: CedarContext,
    schema: Option<&Schema>,
) -> Result<Request, String> {
    Request::new(principal.uid.clone(), action.uid.clone(), resource.uid.clone(), context, schema)
        .map_err(said)
}

fn context(reason: Option<&str>) -> Result<CedarContext, String> {
    CedarContext::from_pairs(reason.map(|reason| ("reason".to_owned(), string(reason)))).map_err(said)
}

/// The reason, where there is more than space in it.
fn stated(context: &Context) -> Option<&str> {
    context.reason.as_deref().filter(|reason| !reason.trim().is_empty())
}

fn principal_entity<'a>(
    principal: &Party,
    claims: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<Entity, String> {
    let tags = claims.into_iter().map(|(name, value)| (name.to_owned(), string(value)));
    Entity::new_with_tags(principal.uid.clone(), [], principal.parents.iter().cloned(), tags).map_err(said)
}

fn environment_entity(environment: &Party, name: &str, protected: bool) -> Result<Entity, String> {
    entity(
        environment,
        [("environment", string(name)), ("protected", RestrictedExpression::new_bool(protected))],
    )
}

fn secret_entity(secret: &Party, environment: &str, name: &str, protected: bool) -> Result<Entity, String> {
    let folders = name.match_indices('/').filter_map(|(end, _)| name.get(..end)).map(string);
    entity(
        secret,
        [
            ("name", string(name)),
            ("folders", RestrictedExpression::new_set(folders)),
            ("environment", string(environment)),
            ("protected", RestrictedExpression::new_bool(protected)),
        ],
    )
}

fn entity<const N: usize>(
    party: &Party,
    attributes: [(&str, RestrictedExpression); N],
) -> Result<Entity, String> {
    let attributes = attributes.into_iter().map(|(name, value)| (name.to_owned(), value));
    Entity::new_with_tags(party.uid.clone(), attributes, party.parents.iter().cloned(), []).map_err(said)
}

fn string(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

/// An error with its causes.
fn said(error: impl std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::SHIPPED;

    fn shipped() -> &'static str {
        SHIPPED.iter().find(|(name, _)| *name == "schema.cedarschema").unwrap().1
    }

    fn words(schema: &str) -> Result<Vocabulary, String> {
        Vocabulary::of(&Schema::from_cedarschema_str(schema).unwrap().0)
    }

    #[test]
    fn the_shipped_schema_fits() {
        let words = words(shipped()).unwrap();
        for action in Action::ALL {
            assert_eq!(words.action(*action).unwrap().uid.id().unescaped(), action.as_str());
        }
    }

    #[test]
    fn a_schema_that_promises_more_or_less_is_refused() {
        for (from, to, named) in [
            ("entity User in [Group] tags String;", "entity User in [Group];", "claim"),
            (
                "entity User in [Group] tags String;",
                "entity User in [Group] { email: String } tags String;",
                "email",
            ),
            ("entity User in [Group] tags String;", "entity Person in [Group] tags String;", "User"),
            ("  folders: Set<String>,\n", "", "folders"),
            ("reason?: String", "reason: String", "context"),
            ("reason?: String", "reason?: Long", "context"),
            ("reason?: String", "ticket: String", "context"),
            ("promote, ", "", "promote"),
            ("[Environment, Secret]", "[Secret]", "Environment"),
            ("entity Secret in [Environment]", "entity Secret", "Environment"),
        ] {
            assert!(shipped().contains(from), "{from}");
            let changed = shipped().replace(from, to);
            let Ok((schema, _)) = Schema::from_cedarschema_str(&changed) else { continue };
            let problem = Vocabulary::of(&schema).err().unwrap_or_else(|| panic!("{to:?} was accepted"));
            assert!(problem.contains(named), "{to:?}: {problem}");
        }
    }

    #[test]
    fn action_groups_of_a_schema_are_known() {
        let grouped = shipped().replace(
            "action read,",
            "action look;\naction read in [look] appliesTo {\n  principal: \
             [User, Workload],\n  resource: [Environment, Secret],\n  context: Request,\n};\naction ",
        );
        let words = words(&grouped).unwrap();
        let read = words.action(Action::Read).unwrap();
        assert_eq!(
            read.parents.iter().map(|uid| uid.id().unescaped().to_owned()).collect::<Vec<_>>(),
            ["look"]
        );
        assert!(words.action(Action::List).unwrap().parents.is_empty());
    }

    #[test]
    fn a_secret_is_in_its_environment_and_its_folders() {
        let words = words(shipped()).unwrap();
        let party = words.secret("production", "a/b/c");
        assert_eq!(party.uid.to_string(), r#"Secret::"production:a/b/c""#);
        assert!(party.is_in(&words.environment("production").uid));
        assert!(!party.is_in(&words.environment("staging").uid));
        let entity = secret_entity(&party, "production", "a/b/c", true).unwrap();
        let folders = entity.attr("folders").unwrap().unwrap().to_string();
        assert!(
            folders.contains("\"a\"") && folders.contains("\"a/b\"") && !folders.contains("\"a/b/c\""),
            "{folders}"
        );
    }
}
