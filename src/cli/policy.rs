//! `claviger policy`: policies as files (`check`, `test`), as the broker or files decide (`explain`), and as the broker
//! reads them anew (`reload`).
//!
//! ```text
//! check    {"policies","warnings":[…],"passed","failed","cases":[{"name","passed","expected","found","policies"}]}
//! test     the same
//! explain  {"effect":"allow"|"deny"|"approval_required","approvals","principal","action","resource",
//!           "policies":[{"id","file","effect":"permit"|"forbid","satisfied","decided","error"}]}
//! reload   {"generation","policies","warnings":[…]}
//! ```
//!
//! Files alone don't say which environments a broker declares. Offline they are those that the shipped expectations
//! suppose (`development`, `staging`, `pr-1234` and a protected `production`), unless `--declare` names others.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::connect::connect;
use super::output::{printable, table};
use super::token::{claims, parse_claim};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::environment::{Environment, Registry};
use crate::identity::{Principal, PrincipalKind, Proof};
use crate::policy::{
    Action, Context as Asked, Effect, ExpectationReport, Explanation, Policies, PolicySource, Resource,
    load_expectations,
};
use crate::proto::v1;
use crate::secret::{EnvironmentName, SecretId, SecretName};

/// What is declared where nothing is said.
const SUPPOSED: [&str; 4] = ["development", "staging", "pr-1234", "production:protected"];

/// What can be done with policies.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Validate policy files, and run the expected decisions where there are some
    Check(FilesArgs),
    /// Run the expected decisions of policy files, each on a line
    Test(FilesArgs),
    /// Show why someone may do something, or may not
    Explain(ExplainArgs),
    /// Have the broker read its policy files again; a set that is not valid changes nothing
    Reload,
}

/// What `policy check` and `policy test` take.
#[derive(clap::Args)]
pub(super) struct FilesArgs {
    /// Folder of the policies
    #[arg(value_name = "DIR", default_value = "policies")]
    folder: PathBuf,
    #[command(flatten)]
    declared: DeclaredArgs,
}

/// Which environments there are, where no broker says so.
#[derive(clap::Args)]
pub(super) struct DeclaredArgs {
    /// Environment to suppose, instead of development, staging, pr-1234 and production:protected; may be repeated
    #[arg(long = "declare", value_name = "ENV[:protected]", value_parser = parse_declared)]
    declared: Vec<Environment>,
}

/// What `policy explain` takes.
#[derive(clap::Args)]
pub(super) struct ExplainArgs {
    /// What is to be done: read, list, describe, write, rotate, rollback, delete, promote, approve, administer, audit
    #[arg(value_parser = Action::parse)]
    action: Action,
    /// Secret; without one, the environment as a whole
    name: Option<SecretName>,
    /// The broker itself: its tokens, its policies, the whole audit log
    #[arg(long, conflicts_with = "name")]
    broker: bool,
    /// Who; else the caller
    #[arg(long = "as", value_name = "user:ID|workload:ID", value_parser = parse_subject)]
    subject: Option<(PrincipalKind, String)>,
    /// Group of theirs; may be repeated
    #[arg(long = "group", value_name = "GROUP", requires = "subject")]
    groups: Vec<String>,
    /// Claim of theirs; may be repeated
    #[arg(long = "claim", value_name = "KEY=VALUE", value_parser = parse_claim, requires = "subject")]
    claims: Vec<(String, String)>,
    /// Ask the policies in this folder, not the broker
    #[arg(long = "policies", value_name = "DIR", requires = "subject")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    declared: DeclaredArgs,
}

/// Does one of them.
pub(super) async fn run(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Check(args) => check(args, context),
        Command::Test(args) => test(args, context),
        Command::Explain(args) => explain(args, context).await,
        Command::Reload => reload(context).await,
    }
}

fn check(args: FilesArgs, context: &Context) -> Result<Exit, CliError> {
    let has_cases = args.folder.join("tests").is_dir();
    let checked = Checked::of(args, context, has_cases)?;
    context.output.answer(&checked, || checked.text(false))?;
    if !has_cases && !context.output.is_json() {
        context.output.notice("there are no expected decisions; write some into tests/*.toml");
    }
    Ok(checked.exit())
}

fn test(args: FilesArgs, context: &Context) -> Result<Exit, CliError> {
    let checked = Checked::of(args, context, true)?;
    context.output.answer(&checked, || checked.text(true))?;
    Ok(checked.exit())
}

#[derive(Serialize)]
struct Checked {
    policies: usize,
    warnings: Vec<String>,
    passed: usize,
    failed: usize,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    name: String,
    passed: bool,
    expected: String,
    found: String,
    policies: Vec<String>,
}

impl From<ExpectationReport> for Case {
    fn from(report: ExpectationReport) -> Self {
        let ExpectationReport { name, passed, expected, found, policies } = report;
        let policies = policies.iter().map(ToString::to_string).collect();
        Self { name, passed, expected, found, policies }
    }
}

impl Checked {
    fn of(args: FilesArgs, context: &Context, with_cases: bool) -> Result<Self, CliError> {
        let source = PolicySource::Directory(args.folder);
        let policies = load(source.clone(), args.declared.environments(), context)?;
        let expectations = if with_cases { load_expectations(&source)? } else { Vec::new() };
        let cases: Vec<Case> =
            expectations.iter().map(|expectation| Case::from(expectation.check(&policies))).collect();
        let passed = cases.iter().filter(|case| case.passed).count();
        Ok(Self {
            policies: policies.len(),
            warnings: policies.warnings(),
            passed,
            failed: cases.len() - passed,
            cases,
        })
    }

    /// The failed cases, or all of them.
    fn text(&self, every_case: bool) -> String {
        let Self { policies, passed, failed, .. } = self;
        let mut lines = warning_lines(&self.warnings);
        lines.extend(self.cases.iter().filter(|case| every_case || !case.passed).map(Case::line));
        lines.push(format!("policies valid: {policies}; expected decisions: {passed} hold, {failed} fail"));
        lines.join("\n")
    }

    fn exit(&self) -> Exit {
        if self.failed == 0 { Exit::DONE } else { Exit::FAULTS }
    }
}

impl Case {
    fn line(&self) -> String {
        let name = printable(&self.name);
        match self.passed {
            true => format!("ok    {name}"),
            false => format!(
                "FAIL  {name}: expected {}, found {}",
                printable(&self.expected),
                printable(&self.found)
            ),
        }
    }
}

/// A line for each.
fn warning_lines(warnings: &[String]) -> Vec<String> {
    warnings.iter().map(|warning| format!("warning: {}", printable(warning))).collect()
}

fn load(source: PolicySource, declared: Vec<Environment>, context: &Context) -> Result<Policies, CliError> {
    let registry = Registry::new(declared)?;
    Ok(Policies::load(source, registry, Arc::clone(&context.clock))?)
}

impl DeclaredArgs {
    fn environments(self) -> Vec<Environment> {
        if !self.declared.is_empty() {
            return self.declared;
        }
        SUPPOSED.iter().filter_map(|text| parse_declared(text).ok()).collect()
    }
}

async fn explain(args: ExplainArgs, context: &Context) -> Result<Exit, CliError> {
    let resource = args.resource(context)?;
    let explained = match args.folder.is_some() {
        true => explain_files(args, &resource, context)?,
        false => ask(args, &resource, context).await?,
    };
    context.output.answer(&explained, || explained.text())?;
    Ok(Exit::DONE)
}

impl ExplainArgs {
    fn resource(&self, context: &Context) -> Result<Resource, CliError> {
        if self.broker {
            return Ok(Resource::Broker);
        }
        Ok(match (&self.name, context.chosen_environment()?) {
            (Some(name), _) => Resource::Secret(SecretId::new(context.environment()?, name.clone())),
            (None, Some(environment)) => Resource::Environment(environment),
            (None, None) => Resource::Broker,
        })
    }
}

async fn ask(args: ExplainArgs, resource: &Resource, context: &Context) -> Result<Explained, CliError> {
    let claims = claims(args.claims)?;
    let subject = args.subject.map(|(kind, id)| v1::Subject {
        kind: match kind {
            PrincipalKind::User => v1::PrincipalKind::User,
            PrincipalKind::Workload => v1::PrincipalKind::Workload,
        }
        .into(),
        id,
        groups: args.groups,
        claims: claims.into_iter().collect(),
    });
    let request = v1::ExplainRequest {
        action: args.action.to_string(),
        environment: resource.environment().map(ToString::to_string).unwrap_or_default(),
        name: match resource {
            Resource::Secret(id) => id.name.to_string(),
            _ => String::new(),
        },
        reason: context.reason(),
        subject,
    };
    let answer = connect(context).await?.policies().explain(request).await.map_err(ClientError::from)?;
    Explained::from_answer(answer.into_inner(), args.action, resource)
}

fn explain_files(args: ExplainArgs, resource: &Resource, context: &Context) -> Result<Explained, CliError> {
    // Both are there: clap asks for the second one with the first.
    let (Some(folder), Some((kind, id))) = (args.folder, args.subject) else {
        return Err(CliError::usage("--policies needs --as: files don't know who you are"));
    };
    let declared = args.declared.environments();
    undeclared(&declared, resource).iter().for_each(|notice| context.output.notice(notice));
    let policies = load(PolicySource::Directory(folder), declared, context)?;
    let groups: BTreeSet<String> = args.groups.into_iter().collect();
    let proof = Proof { method: "supposed", detail: String::new() };
    let principal = Arc::new(Principal::new(kind, id, groups, claims(args.claims)?, proof));
    let asked = Asked { reason: context.global.reason.clone() };
    let explanation = policies.explain(&principal, args.action, resource, &asked);
    Ok(Explained::from_files(explanation, &principal, args.action, resource))
}

/// Said of an environment that there would not be: what is decided about it holds for no broker.
fn undeclared(declared: &[Environment], resource: &Resource) -> Option<String> {
    let asked = resource.environment()?;
    if declared.iter().any(|environment| environment.name == *asked) {
        return None;
    }
    let names: Vec<&str> = declared.iter().map(|environment| environment.name.as_str()).collect();
    let names = names.join(", ");
    Some(format!(
        "environment {asked} is none of those supposed ({names}), so it counts as protected; add --declare {asked}"
    ))
}

#[derive(Serialize)]
struct Explained {
    effect: &'static str,
    approvals: u8,
    principal: String,
    action: &'static str,
    resource: String,
    policies: Vec<Policy>,
}

#[derive(Serialize)]
struct Policy {
    id: String,
    file: String,
    effect: String,
    satisfied: bool,
    decided: bool,
    error: Option<String>,
}

impl Explained {
    fn from_answer(
        answer: v1::ExplainResponse,
        action: Action,
        resource: &Resource,
    ) -> Result<Self, CliError> {
        let approvals = u8::try_from(answer.approvals).unwrap_or(u8::MAX);
        let effect = match answer.effect() {
            v1::Effect::Allow => Effect::Allow,
            v1::Effect::Deny => Effect::Deny,
            v1::Effect::ApprovalRequired => Effect::ApprovalRequired(approvals),
            v1::Effect::Unspecified => return Err(ClientError::malformed("holds no decision").into()),
        };
        let policies = answer.policies.into_iter().map(|policy| Policy {
            id: policy.id,
            file: policy.file,
            effect: policy.effect,
            satisfied: policy.satisfied,
            decided: policy.decided,
            error: (!policy.error.is_empty()).then_some(policy.error),
        });
        Ok(Self::new(effect, answer.principal, action, resource, policies.collect()))
    }

    fn from_files(
        explanation: Explanation,
        principal: &Principal,
        action: Action,
        resource: &Resource,
    ) -> Self {
        let policies = explanation.policies.into_iter().map(|policy| Policy {
            id: policy.id.to_string(),
            file: policy.file.to_string(),
            effect: policy.effect.to_owned(),
            satisfied: policy.satisfied,
            decided: policy.decided,
            error: policy.error,
        });
        Self::new(explanation.effect, principal.to_string(), action, resource, policies.collect())
    }

    fn new(
        effect: Effect,
        principal: String,
        action: Action,
        resource: &Resource,
        policies: Vec<Policy>,
    ) -> Self {
        let approvals = match effect {
            Effect::ApprovalRequired(approvals) => approvals,
            Effect::Allow | Effect::Deny => 0,
        };
        let (action, resource) = (action.as_str(), resource.to_string());
        Self { effect: effect.as_str(), approvals, principal, action, resource, policies }
    }

    fn text(&self) -> String {
        let Self { principal, action, resource, approvals, .. } = self;
        let may = match self.effect {
            "allow" => "may",
            "approval_required" => "may, with approvals by others,",
            _ => "may not",
        };
        let mut text = format!("{} {may} {action} {resource}\n", printable(principal));
        if *approvals > 0 {
            text.push_str(&format!("approvals needed: {approvals}\n"));
        }
        if self.policies.is_empty() {
            return text + "no policy applies, and what is not permitted is denied\n";
        }
        text + "\n"
            + &table(["POLICY", "FILE", "EFFECT", "CONDITIONS", ""], self.policies.iter().map(Policy::row))
    }
}

impl Policy {
    fn row(&self) -> [String; 5] {
        let conditions = match (&self.error, self.satisfied) {
            (Some(error), _) => format!("fail: {error}"),
            (None, true) => "hold".to_owned(),
            (None, false) => "do not hold".to_owned(),
        };
        let decided = if self.decided { "decided" } else { "" };
        [self.id.clone(), self.file.clone(), self.effect.clone(), conditions, decided.to_owned()]
    }
}

async fn reload(context: &Context) -> Result<Exit, CliError> {
    let mut client = connect(context).await?.policies();
    let answer = client.reload(v1::ReloadRequest {}).await.map_err(ClientError::from)?;
    let reloaded = Reloaded::from(answer.into_inner());
    context.output.answer(&reloaded, || reloaded.text())?;
    Ok(Exit::DONE)
}

#[derive(Serialize)]
struct Reloaded {
    generation: u64,
    policies: i32,
    warnings: Vec<String>,
}

impl From<v1::ReloadResponse> for Reloaded {
    fn from(answer: v1::ReloadResponse) -> Self {
        let v1::ReloadResponse { generation, policies, warnings } = answer;
        Self { generation, policies, warnings }
    }
}

impl Reloaded {
    fn text(&self) -> String {
        let mut lines = warning_lines(&self.warnings);
        lines.push(format!("policies in force: {}; generation {}", self.policies, self.generation));
        lines.join("\n")
    }
}

/// `NAME` or `NAME:protected`.
fn parse_declared(text: &str) -> Result<Environment, String> {
    let (name, protected) = match text.split_once(':') {
        None => (text, false),
        Some((name, "protected")) => (name, true),
        Some(_) => return Err("is neither NAME nor NAME:protected".to_owned()),
    };
    let name = EnvironmentName::parse(name).map_err(|error| error.to_string())?;
    Ok(Environment { protected, ..Environment::sealed(name) })
}

/// `user:ID` or `workload:ID`.
pub(super) fn parse_subject(text: &str) -> Result<(PrincipalKind, String), String> {
    match text.split_once(':') {
        Some(("user", id)) if !id.is_empty() => Ok((PrincipalKind::User, id.to_owned())),
        Some(("workload", id)) if !id.is_empty() => Ok((PrincipalKind::Workload, id.to_owned())),
        _ => Err("is neither user:ID nor workload:ID".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{context, refusal};
    use super::*;
    use crate::policy::SHIPPED;

    fn explain_args() -> ExplainArgs {
        ExplainArgs {
            action: Action::Read,
            name: None,
            broker: false,
            subject: None,
            groups: Vec::new(),
            claims: Vec::new(),
            folder: None,
            declared: DeclaredArgs { declared: Vec::new() },
        }
    }

    #[test]
    fn declared_environments_may_be_protected() {
        assert!(parse_declared("pr-1:protected").unwrap().protected);
        assert!(!parse_declared("production").unwrap().protected, "a name protects nothing");
        for bad in ["", "A", "a:b", "a:protected:x", ":protected"] {
            assert!(parse_declared(bad).is_err(), "{bad}");
        }
        let supposed = DeclaredArgs { declared: Vec::new() }.environments();
        let shown: Vec<_> = supposed.iter().map(|e| (e.name.as_str(), e.protected)).collect();
        assert_eq!(
            shown,
            [("development", false), ("staging", false), ("pr-1234", false), ("production", true)]
        );
    }

    #[test]
    fn an_environment_that_is_not_supposed_is_pointed_out() {
        let supposed = DeclaredArgs { declared: Vec::new() }.environments();
        let environment = |name| Resource::Environment(EnvironmentName::parse(name).unwrap());
        let notice = undeclared(&supposed, &environment("nowhere")).unwrap();
        assert!(notice.contains("nowhere") && notice.contains("--declare"), "{notice}");
        assert_eq!(undeclared(&supposed, &environment("staging")), None);
        assert_eq!(undeclared(&supposed, &Resource::Broker), None);
    }

    #[test]
    fn a_subject_has_a_kind_and_an_id() {
        assert_eq!(parse_subject("user:ana").unwrap(), (PrincipalKind::User, "ana".to_owned()));
        let spiffe = parse_subject("workload:spiffe://x/y").unwrap();
        assert_eq!(spiffe, (PrincipalKind::Workload, "spiffe://x/y".to_owned()));
        for bad in ["", "ana", "user:", "group:x"] {
            assert!(parse_subject(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_question_is_about() {
        let resource = |args: &ExplainArgs, arguments: &[&str]| args.resource(&context(arguments, &[]));
        let named = ExplainArgs { name: Some(SecretName::parse("db").unwrap()), ..explain_args() };
        assert_eq!(resource(&explain_args(), &[]).unwrap(), Resource::Broker);
        assert!(matches!(resource(&explain_args(), &["-e", "staging"]), Ok(Resource::Environment(_))));
        let secret = resource(&named, &["-e", "staging"]).unwrap();
        assert_eq!(secret.to_string(), "secret `db` in environment `staging`");
        assert_eq!(resource(&named, &[]).unwrap_err().exit(), Exit::USAGE);
        let broker = ExplainArgs { broker: true, ..explain_args() };
        assert_eq!(resource(&broker, &["-e", "staging"]).unwrap(), Resource::Broker);
    }

    #[test]
    fn an_unknown_action_is_told_the_nearest() {
        let text = refusal(&["policy", "explain", "raed", "db"]).render().to_string();
        assert!(text.contains("`read`"), "{text}");
        assert_eq!(refusal(&["policy", "explain", "read", "--policies", "x"]).exit_code(), 2);
    }

    #[test]
    fn what_was_read_again_is_shown_with_its_warnings() {
        let warnings = vec!["one\nthing".to_owned(), "another".to_owned()];
        let reloaded = Reloaded::from(v1::ReloadResponse { generation: 3, policies: 12, warnings });
        assert_eq!(
            reloaded.text(),
            "warning: one\\nthing\nwarning: another\npolicies in force: 12; generation 3"
        );
        let json = serde_json::to_value(&reloaded).unwrap();
        assert_eq!((&json["generation"], &json["policies"]), (&3.into(), &12.into()));
        assert_eq!(json["warnings"][1], "another");
    }

    #[test]
    fn files_are_checked_tested_and_explained_without_a_broker() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in SHIPPED {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let files = || FilesArgs {
            folder: folder.path().to_owned(),
            declared: DeclaredArgs { declared: Vec::new() },
        };
        let context = context(&["-e", "production"], &[]);
        let checked = Checked::of(files(), &context, false).unwrap();
        assert!(checked.policies > 0 && checked.cases.is_empty());
        assert_eq!(checked.exit(), Exit::DONE);
        std::fs::create_dir(folder.path().join("tests")).unwrap();
        let case = "[[case]]\nname = \"strangers read\"\nprincipal = { kind = \"user\", id = \"nobody\" }\n\
                    action = \"read\"\nresource = \"production:db\"\nexpect = \"allow\"\n";
        std::fs::write(folder.path().join("tests/wrong.toml"), case).unwrap();
        let tested = Checked::of(files(), &context, true).unwrap();
        assert_eq!((tested.passed, tested.failed, tested.exit()), (0, 1, Exit::FAULTS));
        assert!(
            tested.text(false).contains("FAIL  strangers read: expected allow, found deny"),
            "{}",
            tested.text(false)
        );
        let args = ExplainArgs {
            subject: Some((PrincipalKind::User, "nobody".to_owned())),
            folder: Some(folder.path().to_owned()),
            ..explain_args()
        };
        let resource = args.resource(&context).unwrap();
        let explained = explain_files(args, &resource, &context).unwrap();
        assert_eq!(explained.effect, "deny");
        assert!(explained.text().starts_with("User::\"nobody\" may not read environment `production`"));
    }
}
