//! What is wrong with the command line itself: clap finds it, and it is said like every other error.
//!
//! ```text
//! error: invalid value 'x' for '--limit <N>': …          claviger: invalid value 'x' for '--limit <N>': …; a similar
//!                                                ──▶     argument exists: '--y' [INVALID_ARGUMENT]
//!   tip: a similar argument exists: '--y'
//!
//! Usage: …
//! ```

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::CliError;
use super::output::{Format, printable, without_tokens};

/// The most characters of what was typed that are repeated at once.
const MOST_REPEATED: usize = 64;
/// The most characters of the whole message.
const MOST: usize = 300;

/// The format of errors where the command line can't be parsed: JSON where it is asked for before the `--` of a
/// command to run.
pub(super) fn format_of(arguments: &[OsString]) -> Format {
    let ours: Vec<&OsString> = arguments.iter().take_while(|argument| argument.as_os_str() != "--").collect();
    let as_two = ours.windows(2).any(
        |pair| matches!(pair, [option, value] if option.as_os_str() == "--output" && value.as_os_str() == "json"),
    );
    let as_one = ours.iter().any(|argument| argument.as_os_str() == "--output=json");
    if as_one || as_two { Format::Json } else { Format::Text }
}

/// What clap found wrong, on one line. What was typed is cut, and escaped where it would disturb a terminal.
pub(super) fn complaint(mut error: clap::Error) -> CliError {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return CliError::usage("a subcommand is missing; `--help` lists them");
    }
    for kind in [ContextKind::InvalidArg, ContextKind::InvalidValue, ContextKind::InvalidSubcommand] {
        let Some(ContextValue::String(typed)) = error.get(kind) else { continue };
        let shown = cut(&printable(&without_tokens(typed)), MOST_REPEATED);
        if shown != *typed {
            // Free tips repeat what was typed as it was.
            error.remove(ContextKind::Suggested);
            error.insert(kind, ContextValue::String(shown));
        }
    }
    error.remove(ContextKind::Usage);
    // What a value's own parser says repeats it too.
    let message = without_tokens(&one_line(&error.render().to_string()));
    CliError::usage(cut(&message, MOST))
}

fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines = text.lines().map(str::trim);
    let mut message = String::new();
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with("For more information")) {
        match line.strip_prefix("tip: ") {
            Some(tip) => message.extend(["; ", tip]),
            None if message.is_empty() => message.push_str(line),
            None => message.extend([" ", line]),
        }
    }
    message
}

fn cut(text: &str, most: usize) -> String {
    let dots = if text.chars().nth(most).is_some() { "…" } else { "" };
    text.chars().take(most).chain(dots.chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Exit;
    use super::super::tests::refusal;
    use super::*;
    use crate::error::Reason;

    fn message(arguments: &[&str]) -> String {
        let error = complaint(refusal(arguments));
        assert_eq!((error.reason, error.exit()), (Some(Reason::InvalidArgument), Exit::USAGE));
        assert!(!error.message.contains('\n') && !error.message.contains('\u{1b}'), "{:?}", error.message);
        assert!(error.message.chars().count() <= MOST + 1, "{}", error.message);
        error.message
    }

    #[test]
    fn a_complaint_is_one_line_with_its_tip() {
        assert_eq!(message(&["get"]), "the following required arguments were not provided: <NAME[#FIELD]>");
        assert_eq!(message(&["lst"]), "unrecognized subcommand 'lst'; a similar subcommand exists: 'list'");
        assert_eq!(
            message(&["--output", "yaml", "list"]),
            "invalid value 'yaml' for '--output <FORMAT>' [possible values: text, json]"
        );
        assert!(message(&["--reason", "", "list"]).ends_with("is empty; say why, or leave it out"));
        assert!(message(&["policy"]).contains("subcommand"));
    }

    #[test]
    fn what_was_typed_is_cut_and_moves_no_cursor() {
        let long = "x".repeat(5_000);
        let long = long.as_str();
        for arguments in [&["get", "db", long][..], &[long], &["-e", long, "list"], &["--output", long]] {
            let message = message(arguments);
            assert!(!message.contains(&"x".repeat(MOST_REPEATED + 1)), "{message}");
        }
        assert!(message(&["l\u{1b}[2J\nst"]).contains("l\\u{1b}[2J\\nst"));
    }

    #[test]
    fn a_token_is_not_repeated() {
        let token = format!("clv_{}_{}", "0".repeat(16), "s3cret".repeat(7));
        let token = token.as_str();
        for arguments in
            [&["get", "db", token][..], &[token], &["put", "db", "--request-token", token], &["-e", token]]
        {
            assert!(!message(arguments).contains("s3cret"), "{}", message(arguments));
        }
    }

    #[test]
    fn json_is_what_stands_before_a_command_to_run() {
        let format =
            |arguments: &[&str]| format_of(&arguments.iter().map(OsString::from).collect::<Vec<_>>());
        for json in [&["--output", "json", "lst"][..], &["lst", "--output=json"]] {
            assert_eq!(format(json), Format::Json, "{json:?}");
        }
        for text in [&[][..], &["--output"], &["--output", "text"], &["exec", "--", "x", "--output", "json"]]
        {
            assert_eq!(format(text), Format::Text, "{text:?}");
        }
    }
}
