//! What a decision costs that is not cached, among few policies and among many: in this process, without a wire.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger::clock::SystemClock;
use claviger::environment::{Environment, Registry};
use claviger::identity::{Principal, PrincipalKind, Proof};
use claviger::policy::{Action, Context, Policies, PolicySource, Resource, SHIPPED};
use claviger::secret::SecretId;

use crate::{percentile, row};

const ENVIRONMENTS: [&str; 3] = ["development", "staging", "production"];
/// How many questions a median is of, at least; and the most that are put to one load of the policies.
const QUESTIONS: usize = 2_000;
const POLICIES_PER_FILE: usize = 100;
const POLICIES_PER_TEAM: usize = 10;

/// Two medians: where the policies that fit are put together for the question, and where a colleague's question left
/// them so.
pub(crate) fn measure() {
    let mut fewest = None;
    for (count, target) in [(50, "–"), (500, "–"), (10_000, "≤ 20 µs")] {
        let medians = medians(count);
        let baseline = *fewest.get_or_insert(medians);
        for (number, kind) in ["its policy set new", "its policy set known"].into_iter().enumerate() {
            let name = format!("decision not cached, {count} policies, {kind}");
            let (bare, ours) = (baseline[number], medians[number]);
            let ratio = format!("{:.2}", ours.as_secs_f64() / bare.as_secs_f64());
            row([&name, &microseconds(bare), &microseconds(ours), &ratio, target]);
        }
    }
}

fn microseconds(time: Duration) -> String {
    format!("{:.1} µs", time.as_secs_f64() * 1e6)
}

fn medians(count: usize) -> [Duration; 2] {
    let policies = Policies::load(source(count), registry(), SystemClock::shared())
        .unwrap_or_else(|error| panic!("{count} policies: {error}"));
    assert_eq!(policies.len(), count);
    let (mut first, mut second) = (Vec::<Duration>::new(), Vec::<Duration>::new());
    loop {
        for (caller, times) in [("ana", &mut first), ("ben", &mut second)] {
            // Not in order, and none twice: 7,919 is prime.
            let numbers = (0..count.min(QUESTIONS)).map(|number| number * 7_919 % count);
            times.extend(numbers.map(|number| ask(&policies, caller, number)));
        }
        if first.len() >= QUESTIONS {
            return [percentile(&mut first, 50), percentile(&mut second, 50)];
        }
        // Forgets what was decided.
        policies.reload().expect("the same policies as before");
    }
}

/// May this caller, of the team that policy `number` is for, read the secret that it is for?
fn ask(policies: &Policies, caller: &str, number: usize) -> Duration {
    let groups = [team(number), "team".to_owned(), "engineering".to_owned()];
    let principal = Arc::new(Principal::new(
        PrincipalKind::User,
        format!("{caller}-{number}"),
        BTreeSet::from(groups),
        BTreeMap::new(),
        Proof { method: "token", detail: String::new() },
    ));
    let resource = Resource::Secret(SecretId::parse(environment(number), &secret(number)).unwrap());
    let context = Context::default();
    let start = Instant::now();
    let answer = policies.authorize(&principal, Action::Read, &resource, &context);
    let took = start.elapsed();
    if let Err(refusal) = answer {
        panic!("policy {number}: {refusal}");
    }
    took
}

fn registry() -> Registry {
    let environments = ENVIRONMENTS.map(|name| {
        let mut environment = Environment::sealed(name.parse().unwrap());
        environment.protected = name == "production";
        environment
    });
    Registry::new(environments).unwrap()
}

/// The shipped schema with `count` policies, in files as people keep them.
fn source(count: usize) -> PolicySource {
    let (schema, text) = SHIPPED.iter().find(|(name, _)| name.ends_with(".cedarschema")).expect("a schema");
    let mut texts = vec![((*schema).to_owned(), (*text).to_owned())];
    for first in (0..count).step_by(POLICIES_PER_FILE) {
        let mut text = String::new();
        for number in first..count.min(first + POLICIES_PER_FILE) {
            writeln!(text, "{}", policy(number)).unwrap();
        }
        texts.push((format!("teams-{first:05}.cedar"), text));
    }
    PolicySource::Texts(texts)
}

/// A permit for one team: for one secret, or, every tenth, for whatever of an environment is in the team's folder.
fn policy(number: usize) -> String {
    let (team, environment, secret) = (team(number), environment(number), secret(number));
    let (resource, condition) = if number % POLICIES_PER_TEAM == POLICIES_PER_TEAM - 1 {
        let condition = format!("\nwhen {{ resource.folders.contains(\"{team}\") }}");
        (format!("is Secret in Environment::\"{environment}\""), condition)
    } else {
        (format!("== Secret::\"{environment}:{secret}\""), String::new())
    };
    format!(
        "@id(\"{team}-reads-{number}\")\npermit (\n  principal in Group::\"{team}\",\n  \
         action in [Action::\"read\", Action::\"describe\"],\n  resource {resource}\n){condition};\n"
    )
}

fn team(number: usize) -> String {
    format!("team-{}", number / POLICIES_PER_TEAM)
}

fn environment(number: usize) -> &'static str {
    ENVIRONMENTS[number % ENVIRONMENTS.len()]
}

fn secret(number: usize) -> String {
    format!("{}/service-{}/database", team(number), number % POLICIES_PER_TEAM)
}
