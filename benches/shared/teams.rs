//! As many policies as one likes, of the kind that teams write: each for one secret, or, every tenth, for whatever of an
//! environment is in the team's folder.

use std::fmt::Write as _;

use claviger::policy::SHIPPED;

/// The environments that they speak of.
pub(crate) const ENVIRONMENTS: [&str; 3] = ["development", "staging", "production"];

const POLICIES_PER_FILE: usize = 100;
const POLICIES_PER_TEAM: usize = 10;

/// The shipped schema with `count` policies, in files as people keep them: pairs of name and text.
pub(crate) fn texts(count: usize) -> Vec<(String, String)> {
    let (schema, text) = SHIPPED.iter().find(|(name, _)| name.ends_with(".cedarschema")).expect("a schema");
    let mut texts = vec![((*schema).to_owned(), (*text).to_owned())];
    for first in (0..count).step_by(POLICIES_PER_FILE) {
        let mut text = String::new();
        for number in first..count.min(first + POLICIES_PER_FILE) {
            writeln!(text, "{}", policy(number)).unwrap();
        }
        texts.push((format!("teams-{first:05}.cedar"), text));
    }
    texts
}

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

/// The team that a policy is for.
pub(crate) fn team(number: usize) -> String {
    format!("team-{}", number / POLICIES_PER_TEAM)
}

/// The environment that it is for.
pub(crate) fn environment(number: usize) -> &'static str {
    ENVIRONMENTS[number % ENVIRONMENTS.len()]
}

/// A secret that it permits.
pub(crate) fn secret(number: usize) -> String {
    format!("{}/service-{}/database", team(number), number % POLICIES_PER_TEAM)
}
