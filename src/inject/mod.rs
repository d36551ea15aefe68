//! Into a process: what an application's manifest asks for, resolved, checked and put into its environment.
//!
//! ```text
//!   claviger.toml ─▶ Manifest ── variables_for(environment) ──▶ [Variable] ── references ──▶ one batch of reads
//!                                                                  │                               │
//!                                                                  └──────────▶ resolve ◀── answers ┘
//!                                                                                  │
//!   without a manifest: every secret ─▶ from_secrets ──────────────────────▶ Variables
//!                                                                                  │
//!                           the parent's environment ─────────▶ compose ◀──────────┘
//!                                                                  │
//!                                                          ChildEnvironment ──▶ exec::replace | exec::spawn
//! ```
//!
//! Nothing here calls the broker, and nothing here reads this process's environment: both are handed in.
//! A step that finds faults names all of them at once, one line each, and never shows a value.
//!
//! What a process's environment can't keep secret: `/proc/PID/environ` is readable by the same user and by root, and
//! children inherit it.

mod environ;
pub mod exec;
mod manifest;
mod name;
mod variables;

use std::fmt;

use crate::error::{Reason, Reasoned};
use crate::secret::SecretName;

pub use environ::{ChildEnvironment, Existing, Options, compose};
pub use manifest::{MAX_MANIFEST_BYTES, Manifest, ManifestError, ManifestProblem, Variable, VariableSource};
pub use name::{VariableName, VariableNameError};
pub use variables::{Variables, from_secrets, references, resolve};

/// The manifest of the sample application that `claviger dev` serves secrets for.
pub const SAMPLE_MANIFEST: &str = include_str!("sample.toml");

/// Why a process's environment can't be made. Its text has one line per problem and shows no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// Variables are missing or unusable; every one of them is named.
    #[error("{}", joined(.0))]
    Variables(Vec<VariableProblem>),
    /// One string is longer than the kernel passes to a program (execve(2), `MAX_ARG_STRLEN`).
    #[error(
        "{what} is {size} bytes long with its end; the kernel passes at most {limit} in one string; shorten it or hand it \
         over in a file"
    )]
    StringTooLong {
        /// Which variable or argument.
        what: String,
        /// Its size in bytes, name, `=` and closing NUL included.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// Arguments and environment together are more than the kernel passes to a program (execve(2)).
    #[error(
        "arguments and environment are {size} bytes; this process may pass {limit}; the largest variables are {largest}; \
         pass fewer, start from a pristine environment or raise the stack limit (`ulimit -s`)"
    )]
    TooLarge {
        /// Their size in bytes, pointers included.
        size: usize,
        /// The limit in bytes.
        limit: usize,
        /// Names and sizes of the largest variables.
        largest: String,
    },
}

impl Reasoned for InjectError {
    /// For [`Variables`](Self::Variables), the reason of the first problem.
    fn reason(&self) -> Reason {
        match self {
            Self::Variables(problems) => problems.first().map_or(Reason::Internal, |problem| problem.reason),
            Self::StringTooLong { .. } | Self::TooLarge { .. } => Reason::LimitExceeded,
        }
    }
}

/// What is wrong with one variable. Shown as `DB_PASSWORD (database#password): no field …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VariableProblem {
    /// The variable with the reference behind it, or the secret where there is no variable yet.
    pub subject: String,
    /// What is wrong, and the mend; one line.
    pub problem: String,
    /// The stable reason. [`Reason::Unavailable`] for a reference that was not answered: who asked knows why.
    pub reason: Reason,
}

impl fmt::Display for VariableProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.problem)
    }
}

/// Something worth a line on stderr that stops nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The value is the variable's own name, or `changeme`.
    Placeholder {
        /// The variable.
        variable: VariableName,
    },
    /// The parent had another value under this name; the secret replaced it.
    Overridden {
        /// The variable.
        variable: VariableName,
    },
    /// The parent had another value under this name, and it stays because the caller wanted so.
    Kept {
        /// The variable.
        variable: VariableName,
    },
    /// The value begins like a JSON object but is none, so it went into one variable as it is.
    NotJson {
        /// The secret.
        secret: SecretName,
    },
    /// The value is a JSON object without a member, so it gives no variable.
    NoFields {
        /// The secret.
        secret: SecretName,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Placeholder { variable } => {
                write!(f, "{variable} holds a placeholder (its own name, or `changeme`); put a real value")
            }
            Self::Overridden { variable } => {
                write!(
                    f,
                    "{variable} is set in the calling environment to another value; the secret replaces it"
                )
            }
            Self::Kept { variable } => {
                write!(
                    f,
                    "{variable} is set in the calling environment to another value, which stays as asked"
                )
            }
            Self::NotJson { secret } => {
                write!(f, "secret `{secret}` begins like a JSON object but is none; it is injected as it is")
            }
            Self::NoFields { secret } => {
                write!(f, "secret `{secret}` is a JSON object without fields; it gives no variable")
            }
        }
    }
}

fn joined(problems: &[VariableProblem]) -> String {
    problems.iter().map(VariableProblem::to_string).collect::<Vec<_>>().join("\n")
}

/// The text on one line of a terminal or log: what breaks lines, moves the cursor or reorders letters is escaped.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if is_disruptive(c) {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// Control characters, line and paragraph separators, zero-width and bidirectional marks.
fn is_disruptive(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// What a stranger typed, on one line and cut where it is long.
fn cut(text: &str) -> String {
    const MOST: usize = 64;
    let head: String = text.chars().take(MOST).collect();
    let dots = if text.chars().nth(MOST).is_some() { "…" } else { "" };
    format!("{}{dots}", one_line(&head))
}

fn quoted(text: &str) -> String {
    format!("`{}`", cut(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::EnvironmentName;

    #[test]
    fn the_sample_manifest_asks_for_four_secrets() {
        let manifest = Manifest::parse(SAMPLE_MANIFEST, "sample.toml").unwrap();
        let environment = EnvironmentName::parse("development").unwrap();
        let variables = manifest.variables_for(&environment);
        let names: Vec<_> = variables.iter().map(|variable| variable.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "DB_HOST",
                "DB_PORT",
                "DB_NAME",
                "DB_USER",
                "DB_PASSWORD",
                "REDIS_HOST",
                "REDIS_PORT",
                "REDIS_PASSWORD",
                "JWT_SECRET",
                "JWT_REFRESH_SECRET",
                "MARKET_DATA_API_KEY",
                "NEWS_API_KEY",
                "EMAIL_API_KEY",
            ]
        );
        let secrets: Vec<_> =
            references(&variables, &environment).iter().map(|id| id.name.to_string()).collect();
        assert_eq!(secrets, ["database", "redis", "jwt", "api-keys"]);
    }

    #[test]
    fn foreign_text_stays_on_one_line() {
        assert_eq!(one_line("a\r\nb\u{1b}[2J\u{202e}é"), r"a\r\nb\u{1b}[2J\u{202e}é");
        assert_eq!(cut(&"x".repeat(65)), format!("{}…", "x".repeat(64)));
    }

    #[test]
    fn an_error_has_the_reason_of_its_first_problem() {
        let problem = |reason| VariableProblem { subject: "A".to_owned(), problem: "p".to_owned(), reason };
        let error = InjectError::Variables(vec![problem(Reason::FieldNotFound), problem(Reason::ValueEmpty)]);
        assert_eq!(error.reason(), Reason::FieldNotFound);
        assert_eq!(error.to_string(), "A: p\nA: p");
    }
}
