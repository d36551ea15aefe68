//! What a decision costs that is not cached, among few policies and among many: in this process, without a wire.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger::clock::SystemClock;
use claviger::environment::{Environment, Registry};
use claviger::identity::{Principal, PrincipalKind, Proof};
use claviger::policy::{Action, Context, Policies, PolicySource, Resource};
use claviger::secret::SecretId;

use crate::percentile;
use crate::report::{Report, microseconds};
use crate::teams::{ENVIRONMENTS, environment, secret, team, texts};

/// How many questions a median is of, at least; and the most that are put to one load of the policies.
const QUESTIONS: usize = 2_000;

/// Two medians: where the policies that fit are put together for the question, and where a colleague's question left
/// them so.
pub(crate) fn measure(report: &mut Report) {
    let mut fewest = None;
    for (count, target) in [(50, "–"), (500, "–"), (10_000, "≤ 20 µs")] {
        let medians = medians(count).map(|median| median.as_secs_f64() * 1e6);
        let baseline = *fewest.get_or_insert(medians);
        for (number, (kind, figure)) in
            [("its policy set new", "us"), ("its policy set known", "known_us")].into_iter().enumerate()
        {
            let name = format!("decision not cached, {count} policies, {kind}");
            let (bare, ours) = (baseline[number], medians[number]);
            report.figure(format!("decision_{count}_{figure}"), ours);
            let ratio = format!("{:.2}", ours / bare);
            report.row([&name, &microseconds(bare), &microseconds(ours), &ratio, target]);
        }
    }
}

fn medians(count: usize) -> [Duration; 2] {
    let policies = Policies::load(PolicySource::Texts(texts(count)), registry(), SystemClock::shared())
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
