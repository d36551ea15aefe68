//! Policies as their keeper has them: the shipped set and its matrix, a folder that changes under a running broker, and
//! mistakes in it that change nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use claviger::clock::ManualClock;
use claviger::environment::{Environment, Registry};
use claviger::error::{Reason, Reasoned};
use claviger::identity::{Principal, PrincipalKind, Proof};
use claviger::policy::{
    Action, Context, Effect, Grant, Policies, PolicyError, PolicySource, Refusal, Resource, SHIPPED,
    load_expectations,
};
use claviger::secret::SecretId;

fn registry() -> Registry {
    let declared = ["development", "staging", "pr-1234", "production"].map(|name| {
        let mut environment = Environment::sealed(name.parse().unwrap());
        environment.protected = name == "production";
        environment
    });
    Registry::new(declared).unwrap()
}

fn load(source: PolicySource) -> Result<Policies, PolicyError> {
    Policies::load(source, registry(), ManualClock::new("2026-01-01T00:00:00Z".parse().unwrap()))
}

fn person(id: &str, groups: &[&str]) -> Arc<Principal> {
    let groups: BTreeSet<String> = groups.iter().map(ToString::to_string).collect();
    let proof = Proof { method: "token", detail: "test".to_owned() };
    Arc::new(Principal::new(PrincipalKind::User, id, groups, BTreeMap::new(), proof))
}

fn database(environment: &str) -> Resource {
    Resource::Secret(SecretId::parse(environment, "database").unwrap())
}

fn ask(
    policies: &Policies,
    principal: &Arc<Principal>,
    action: Action,
    resource: &Resource,
) -> Result<Grant, Refusal> {
    policies.authorize(principal, action, resource, &Context::default())
}

fn reads(policies: &Policies, principal: &Arc<Principal>, environment: &str) -> bool {
    ask(policies, principal, Action::Read, &database(environment)).is_ok()
}

/// The shipped set in a folder of its own.
fn shipped_into(folder: &Path) -> PolicySource {
    for (name, text) in SHIPPED {
        std::fs::write(folder.join(name), text).unwrap();
    }
    PolicySource::Directory(folder.to_owned())
}

#[test]
fn the_shipped_set_decides_as_its_matrix_says() {
    let source = PolicySource::shipped();
    let policies = load(source.clone()).unwrap();
    let cases = load_expectations(&source).unwrap();
    assert!(cases.len() > 100, "{}", cases.len());
    let mut deciding: BTreeSet<String> = BTreeSet::new();
    for case in cases {
        let report = case.check(&policies);
        assert!(report.passed, "{}: expected {}, found {}", report.name, report.expected, report.found);
        deciding.extend(report.policies.iter().map(ToString::to_string));
    }
    let shipped: BTreeSet<String> = SHIPPED
        .iter()
        .flat_map(|(_, text)| text.split("@id(\"").skip(1))
        .map(|rest| rest.split('"').next().unwrap().to_owned())
        .collect();
    assert_eq!(deciding, shipped, "every policy decides a case");
}

#[test]
fn an_expectation_that_is_not_met_says_what_was_found() {
    let policies = load(PolicySource::shipped()).unwrap();
    let cases = r#"
        [[case]]
        name = "the team deletes production"
        principal = { kind = "user", id = "ana", groups = ["team", "leads"] }
        action = "delete"
        resource = "production:database"
        expect = "allow"
        policies = ["team-deletes"]

        [[case]]
        name = "one approval is enough"
        principal = { kind = "user", id = "ana", groups = ["leads"] }
        action = "delete"
        resource = "production:database"
        expect = "approval_required"
        approvals = 1
    "#;
    let source = PolicySource::Texts(vec![("tests/wrong.toml".to_owned(), cases.to_owned())]);
    let reports: Vec<_> =
        load_expectations(&source).unwrap().iter().map(|case| case.check(&policies)).collect();
    assert!(reports.iter().all(|report| !report.passed), "{reports:?}");
    assert_eq!(reports[0].expected, "allow by team-deletes");
    assert_eq!(reports[0].found, "approval_required (2) by protected-leads-change");
    assert_eq!(reports[1].expected, "approval_required (1)");
    assert_eq!(reports[1].found, "approval_required (2)");
}

#[test]
fn b22_without_a_usable_set_there_are_no_policies() {
    let folder = tempfile::tempdir().unwrap();
    let absent = load(PolicySource::Directory(folder.path().join("absent"))).unwrap_err();
    assert!(absent.to_string().contains("/absent: "), "{absent}");
    let empty = load(PolicySource::Directory(folder.path().to_owned())).unwrap_err();
    assert!(empty.to_string().contains("schema.cedarschema"), "{empty}");
    std::fs::write(folder.path().join("schema.cedarschema"), SHIPPED[0].1).unwrap();
    let only_a_schema = load(PolicySource::Directory(folder.path().to_owned())).unwrap_err();
    assert!(matches!(only_a_schema, PolicyError::Empty { .. }), "{only_a_schema}");
    for error in [absent, empty, only_a_schema] {
        assert_eq!(error.reason(), Reason::InvalidPolicy);
    }
}

#[test]
fn a_reload_takes_effect_at_once_also_for_what_was_decided_before() {
    let folder = tempfile::tempdir().unwrap();
    let policies = load(shipped_into(folder.path())).unwrap();
    let ana = person("ana", &["team"]);
    assert!(reads(&policies, &ana, "development"));
    let before = policies.len();

    let path = folder.path().join("incident.cedar");
    std::fs::write(&path, r#"@id("not-ana") forbid (principal == User::"ana", action, resource);"#).unwrap();
    assert!(reads(&policies, &ana, "development"), "not before it is told");
    let reloaded = policies.reload().unwrap();
    assert_eq!((reloaded.generation, reloaded.policies), (2, before + 1));
    assert_eq!(reloaded.warnings, policies.warnings());
    assert!(!reads(&policies, &ana, "development"));
    for other in ["Ana", "ana ", "aná"] {
        assert!(reads(&policies, &person(other, &["team"]), "development"), "{other:?} is someone else");
    }

    std::fs::remove_file(&path).unwrap();
    policies.reload().unwrap();
    assert_eq!((policies.generation(), policies.len()), (3, before));
    assert!(reads(&policies, &ana, "development"));
}

#[test]
fn b22_whatever_breaks_in_the_folder_the_last_good_set_stays() {
    type Break = fn(&Path);
    let breakages: [(&str, Break); 12] = [
        ("half-written file", |folder| {
            let text = std::fs::read_to_string(folder.join("production.cedar")).unwrap();
            let half = text.find("action in [").unwrap() + 5;
            std::fs::write(folder.join("production.cedar"), &text[..half]).unwrap();
        }),
        ("empty file", |folder| std::fs::write(folder.join("ci.cedar"), "").unwrap()),
        ("only comments", |folder| std::fs::write(folder.join("ci.cedar"), "// soon\n").unwrap()),
        ("deleted schema", |folder| std::fs::remove_file(folder.join("schema.cedarschema")).unwrap()),
        ("bad schema", |folder| {
            std::fs::write(folder.join("schema.cedarschema"), "entity User in [").unwrap()
        }),
        ("foreign schema", |folder| {
            std::fs::write(folder.join("schema.cedarschema"), "entity Photo; action view;").unwrap();
        }),
        ("deleted policies", |folder| {
            for (name, _) in SHIPPED.iter().filter(|(name, _)| name.ends_with(".cedar")) {
                std::fs::remove_file(folder.join(name)).unwrap();
            }
        }),
        ("dangling link", |folder| symlink("nowhere", folder.join("zz.cedar")).unwrap()),
        ("not text", |folder| std::fs::write(folder.join("zz.cedar"), b"\xff\xfe").unwrap()),
        ("too large", |folder| std::fs::write(folder.join("zz.cedar"), " ".repeat(1024 * 1024 + 1)).unwrap()),
        ("unknown action", |folder| {
            let text = r#"@id("z") permit (principal in Group::"g", action == Action::"raed", resource);"#;
            std::fs::write(folder.join("zz.cedar"), text).unwrap();
        }),
        ("the folder itself", |folder| std::fs::remove_dir_all(folder).unwrap()),
    ];
    for (name, break_it) in breakages {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("policies");
        std::fs::create_dir(&folder).unwrap();
        let policies = load(shipped_into(&folder)).unwrap();
        let (ana, eli) = (person("ana", &["team"]), person("eli", &["operators"]));
        assert!(reads(&policies, &ana, "development"));
        break_it(&folder);
        let error = policies.reload().unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidPolicy, "{name}");
        let message = error.to_string();
        assert!(!message.contains('\n') && message.contains("policies"), "{name}: {message}");
        assert_eq!(policies.generation(), 1, "{name}");
        assert!(reads(&policies, &ana, "development") && !reads(&policies, &ana, "production"), "{name}");
        assert!(reads(&policies, &eli, "production"), "{name}");

        let _ = std::fs::remove_file(folder.join("zz.cedar"));
        std::fs::create_dir_all(&folder).unwrap();
        shipped_into(&folder);
        assert_eq!(policies.reload().unwrap().generation, 2, "{name}: mended");
    }
}

#[test]
fn a_folder_of_links_is_read_as_kubernetes_mounts_it() {
    let folder = tempfile::tempdir().unwrap();
    let revision = |name: &str, reader: &str| {
        let inner = folder.path().join(name);
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("schema.cedarschema"), SHIPPED[0].1).unwrap();
        let text = format!(
            "@id(\"read\") permit (principal == User::\"{reader}\", action == Action::\"read\", resource in \
             Environment::\"staging\");"
        );
        std::fs::write(inner.join("read.cedar"), text).unwrap();
    };
    revision("..2026_01_01", "ana");
    revision("..2026_01_02", "ben");
    symlink("..2026_01_01", folder.path().join("..data")).unwrap();
    for name in ["schema.cedarschema", "read.cedar"] {
        symlink(Path::new("..data").join(name), folder.path().join(name)).unwrap();
    }
    let policies = load(PolicySource::Directory(folder.path().to_owned())).unwrap();
    let warnings = policies.warnings();
    assert!(
        warnings.len() == 1 && warnings[0].starts_with("no policy lets anyone administer"),
        "{warnings:?}"
    );
    assert!(reads(&policies, &person("ana", &[]), "staging"));

    symlink("..2026_01_02", folder.path().join("..data_tmp")).unwrap();
    std::fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
    policies.reload().unwrap();
    assert!(!reads(&policies, &person("ana", &[]), "staging"));
    assert!(reads(&policies, &person("ben", &[]), "staging"));
}

#[test]
fn a_wildcard_without_a_reason_is_refused() {
    let with = |policy: &str| {
        let texts = [("schema.cedarschema", SHIPPED[0].1), ("all.cedar", policy)];
        load(PolicySource::Texts(texts.map(|(name, text)| (name.to_owned(), text.to_owned())).to_vec()))
    };
    let error = with("@id(\"all\")\npermit (principal, action, resource);").unwrap_err();
    assert_eq!(
        error.to_string(),
        "all.cedar:1:1, policy `all`: leaves principal, action and resource all open; name the principal or the \
         resource, and list the actions, or say why with @allow_wildcard(\"…\")"
    );
    let policies =
        with("@id(\"all\") @allow_wildcard(\"a test\") permit (principal, action, resource);").unwrap();
    assert_eq!(policies.warnings().len(), 1, "{:?}", policies.warnings());
    assert!(ask(&policies, &person("eve", &[]), Action::Administer, &Resource::Broker).is_ok());
}

#[test]
fn an_explanation_shows_each_policy_that_could_have_a_say() {
    let policies = load(PolicySource::shipped()).unwrap();
    let hana = person("hana", &["break-glass", "leads"]);
    let why = Context { reason: Some("incident 4711".to_owned()) };
    let explanation = policies.explain(&hana, Action::Read, &database("production"), &why);
    assert_eq!(explanation.effect, Effect::Allow);
    assert!(!explanation.cached && !explanation.evaluation_failed);
    let shown: Vec<_> = explanation
        .policies
        .iter()
        .map(|policy| (&*policy.id, &*policy.file, policy.effect, policy.satisfied, policy.decided))
        .collect();
    assert_eq!(
        shown,
        [
            ("break-glass-reads", "break-glass.cedar", "permit", true, true),
            ("production-leads-read", "production.cedar", "permit", true, true),
        ]
    );
    let explanation = policies.explain(&hana, Action::Delete, &database("production"), &why);
    assert_eq!(explanation.effect, Effect::ApprovalRequired(2));
    assert_eq!(explanation.policies[0].approvals, Some(2));
    let explanation = policies.explain(&hana, Action::Read, &database("production"), &Context::default());
    assert!(!explanation.policies[0].satisfied, "no reason was given");
}

#[test]
fn answers_keep_coming_while_policies_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let write = |id: &str| {
        let text = format!(
            "@id(\"{id}\") permit (principal in Group::\"team\", action == Action::\"read\", resource in \
             Environment::\"development\");"
        );
        std::fs::write(folder.path().join("read.cedar"), text).unwrap();
    };
    std::fs::write(folder.path().join("schema.cedarschema"), SHIPPED[0].1).unwrap();
    write("a");
    let policies = load(PolicySource::Directory(folder.path().to_owned())).unwrap();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let policies = &policies;
            scope.spawn(move || {
                let caller = person(&format!("u{number}"), &["team"]);
                for _ in 0..5_000 {
                    let grant = ask(policies, &caller, Action::Read, &database("development")).unwrap();
                    let decided: Vec<&str> = grant.decision().policies.iter().map(|id| &**id).collect();
                    assert!(decided == ["a"] || decided == ["b"], "{decided:?}");
                }
            });
        }
        for id in ["b", "a", "b", "a", "b"] {
            write(id);
            policies.reload().unwrap();
            let grant = ask(&policies, &person("main", &["team"]), Action::Read, &database("development"));
            assert_eq!(&*grant.unwrap().decision().policies[0], id);
        }
    });
    assert_eq!(policies.generation(), 6);
}
