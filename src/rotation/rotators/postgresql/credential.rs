//! The values that this rotator reads and makes: JSON objects with `username` and `password`, and whatever else people
//! put there, which is kept.

use std::ops::Range;

use zeroize::Zeroizing;

use super::settings::Settings;
use crate::rotation::Failure;
use crate::rotation::rotators::object::{CURRENT, Object, PENDING, shown, unfit};
use crate::secret::{FieldName, SecretValue};

const USERNAME: &str = "username";
const PASSWORD: &str = "password";
/// How errors call the admin secret's value.
pub(super) const ADMIN: &str = "the admin secret's value";
/// Members of AWS's format (Secrets Manager, "JSON structure of AWS secrets") that say where, not who.
const PLACES: [&str; 6] = ["engine", "host", "port", "dbname", "dbInstanceIdentifier", "dbClusterIdentifier"];

/// Who logs in, and with what. Has no `Debug`.
pub(super) struct Credential {
    pub(super) username: String,
    pub(super) password: Zeroizing<String>,
}

impl Credential {
    /// Reads a value, which errors call `which`.
    pub(super) fn read(which: &'static str, value: &SecretValue) -> Result<Self, Failure> {
        Self::of(which, &Object::read(which, value)?)
    }

    fn of(which: &str, object: &Object<'_>) -> Result<Self, Failure> {
        let username = object.string(&member(USERNAME)?)?.to_owned();
        let password = Zeroizing::new(object.string(&member(PASSWORD)?)?.to_owned());
        if username.is_empty() || username.chars().any(char::is_control) {
            return Err(unfit(format!("the username in {which} is empty or has a control character in it")));
        }
        match password.is_empty() || password.contains('\0') {
            true => Err(unfit(format!("the password in {which} is empty or has a NUL in it"))),
            false => Ok(Self { username, password }),
        }
    }
}

/// A pair of values that follow each other.
pub(super) struct Pair {
    pub(super) current: Credential,
    pub(super) pending: Credential,
}

impl Pair {
    /// Reads both, where the second is for the other user and can be set.
    pub(super) fn read(
        settings: &Settings,
        current: &SecretValue,
        pending: &SecretValue,
    ) -> Result<Self, Failure> {
        let current = Credential::read(CURRENT, current)?;
        let object = Object::read(PENDING, pending)?;
        let pending = Credential::of(PENDING, &object)?;
        let other = next_user(settings, &current)?;
        if pending.username != other {
            return Err(unfit(format!(
                "{PENDING} is for the user {}; {CURRENT} is {}'s turn, so that the next must be {}'s",
                shown(&pending.username),
                shown(&current.username),
                shown(other)
            )));
        }
        if !pending.password.chars().all(|character| matches!(character, ' '..='~')) {
            return Err(unfit(format!("the password in {PENDING} has characters beyond printable ASCII")));
        }
        if let Some(field) = &settings.url_field {
            url_says(object.string(field)?, field, &pending)?;
        }
        Ok(Self { current, pending })
    }
}

/// The next value: the other user's, with this password.
pub(super) fn next(
    settings: &Settings,
    current: &SecretValue,
    password: &str,
) -> Result<SecretValue, Failure> {
    let object = Object::read(CURRENT, current)?;
    let credential = Credential::of(CURRENT, &object)?;
    let user = next_user(settings, &credential)?;
    stands_alone(settings, &object, &credential)?;
    let mut strings = vec![(USERNAME, user), (PASSWORD, password)];
    let url;
    if let Some(field) = &settings.url_field {
        url = rebuilt(object.string(field)?, field, user, password)?;
        strings.push((field.as_str(), url.as_str()));
    }
    object.with(&strings)
}

/// The user whose turn is next.
pub(super) fn next_user<'a>(settings: &'a Settings, current: &Credential) -> Result<&'a str, Failure> {
    settings.other(&current.username).ok_or_else(|| {
        let [first, second] = settings.users.each_ref().map(|user| shown(user));
        unfit(format!(
            "the username in {CURRENT} is {}, which is neither {first} nor {second}, the definition's users",
            shown(&current.username)
        ))
    })
}

/// Nothing else in the value may speak of the old user or hold the old password: after the rotation it would be wrong.
fn stands_alone(settings: &Settings, object: &Object<'_>, credential: &Credential) -> Result<(), Failure> {
    let password = member(PASSWORD)?;
    for (name, text) in object.others(&password) {
        let replaced = settings.url_field.as_ref().is_some_and(|field| field.as_str() == name);
        if name == USERNAME || replaced || PLACES.contains(&name) {
            continue;
        }
        if holds(text, credential) {
            return Err(unfit(format!(
                "the member {} of {CURRENT} holds the user or the password, and would be wrong after a rotation; \
                 take it out, or name it as `url_field` where it is a postgresql:// URI",
                shown(name)
            )));
        }
    }
    Ok(())
}

fn holds(text: &str, credential: &Credential) -> bool {
    let decoded = decoded(text);
    let user = credential.username.as_str();
    [text.as_bytes(), decoded.as_slice()].into_iter().any(|text| {
        let has = |wanted: &str| text.windows(wanted.len()).any(|window| window == wanted.as_bytes());
        text == user.as_bytes()
            || has(&credential.password)
            || has(&format!("//{user}:"))
            || has(&format!("//{user}@"))
            || has(&format!("user={user}"))
    })
}

/// A URI with another user and password; hosts, database and query stay.
fn rebuilt(url: &str, field: &FieldName, user: &str, password: &str) -> Result<Zeroizing<String>, Failure> {
    let place = userinfo(url, field)?;
    let (before, after) = (url.get(..place.start), url.get(place.end..));
    let (Some(before), Some(after)) = (before, after) else { return Err(no_url(field)) };
    let (user, password) = (encoded(user), encoded(password));
    let at = if after.starts_with('@') { "" } else { "@" };
    let parts: [&str; 6] = [before, &user, ":", &password, at, after];
    // Of its full size from the start: growing would leave copies behind.
    let mut whole = Zeroizing::new(String::with_capacity(parts.iter().map(|part| part.len()).sum()));
    parts.into_iter().for_each(|part| whole.push_str(part));
    Ok(whole)
}

fn url_says(url: &str, field: &FieldName, credential: &Credential) -> Result<(), Failure> {
    let said = url.get(userinfo(url, field)?).unwrap_or_default();
    let (user, password) = said.split_once(':').unwrap_or((said, ""));
    let same = decoded(user).as_slice() == credential.username.as_bytes()
        && decoded(password).as_slice() == credential.password.as_bytes();
    match same {
        true => Ok(()),
        false => Err(unfit(format!(
            "the URI in `{field}` of {PENDING} has another user or password than `username` and `password`"
        ))),
    }
}

/// Where in a `postgresql://` URI user and password stand, or would (PostgreSQL documentation, "Connection URIs").
fn userinfo(url: &str, field: &FieldName) -> Result<Range<usize>, Failure> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| no_url(field))?;
    if !["postgresql", "postgres"].contains(&scheme) {
        return Err(no_url(field));
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let tail = rest.get(authority.len()..).unwrap_or_default();
    if ["?user=", "&user=", "?password=", "&password="].iter().any(|parameter| tail.contains(parameter)) {
        return Err(unfit(format!(
            "the URI in `{field}` has its user or password behind the `?`; write them before the host"
        )));
    }
    let start = scheme.len() + "://".len();
    let length = authority.rfind('@').unwrap_or_default();
    Ok(start..start + length)
}

fn no_url(field: &FieldName) -> Failure {
    unfit(format!("`{field}` is not a URI that begins with postgresql://; write one, or drop `url_field`"))
}

/// Percent-encoding (RFC 3986, section 2.1) of everything that is not unreserved.
fn encoded(text: &str) -> Zeroizing<String> {
    const HEX: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    let hex = |digit: u8| HEX.get(usize::from(digit)).copied().unwrap_or('0');
    let mut encoded = Zeroizing::new(String::with_capacity(text.len() * 3));
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte))
            }
            _ => encoded.extend(['%', hex(byte >> 4), hex(byte & 15)]),
        }
    }
    encoded
}

/// The same backwards; what is no such code stays as it is.
fn decoded(text: &str) -> Zeroizing<Vec<u8>> {
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.first_chunk::<2>().filter(|_| *first == b'%').and_then(|code| {
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            let [high, low] = (*code).map(digit);
            Some((high? << 4) | low?)
        });
        decoded.push(code.unwrap_or(*first));
        rest = match code {
            Some(_) => behind.get(2..).unwrap_or_default(),
            None => behind,
        };
    }
    decoded
}

fn member(name: &str) -> Result<FieldName, Failure> {
    FieldName::parse(name).map_err(|error| unfit(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::Trouble;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn settings(url_field: Option<&str>) -> Settings {
        let mut table = json!({
            "hosts": ["localhost"], "database": "shop", "users": ["app_a", "app_b"], "owner": "app", "admin": "admin",
        });
        if let Some(field) = url_field {
            table["url_field"] = field.into();
        }
        Settings::parse(table.as_object().unwrap()).unwrap()
    }

    fn secret(value: &Value) -> SecretValue {
        SecretValue::text(value.to_string()).unwrap()
    }

    fn read(value: &SecretValue) -> Value {
        serde_json::from_str(value.expose_text().unwrap()).unwrap()
    }

    #[test]
    fn the_users_take_turns_and_the_rest_is_kept() {
        let settings = settings(None);
        let current = SecretValue::text(
            r#"{"engine":"postgres","username":"app_a","password":"postgres","port":5432,"n":1e400}"#
                .to_owned(),
        )
        .unwrap();
        let second = next(&settings, &current, "new").unwrap();
        assert_eq!(
            second.expose_text().unwrap(),
            r#"{"engine":"postgres","username":"app_b","password":"new","port":5432,"n":1e400}"#
        );
        Pair::read(&settings, &current, &second).unwrap();
        let third = next(&settings, &second, "newer").unwrap();
        assert!(third.expose_text().unwrap().contains(r#""username":"app_a","password":"newer""#));
    }

    #[test]
    fn a_stranger_for_a_user_is_refused_naming_both() {
        let current = secret(&json!({"username": "root", "password": "canary-1"}));
        let failure = next(&settings(None), &current, "canary-2").err().unwrap();
        assert_eq!(failure.trouble, Trouble::ValueUnfit);
        assert!(failure.message.contains("`app_a` nor `app_b`"), "{failure}");
        assert!(!failure.message.contains("canary"), "{failure}");
    }

    #[test]
    fn a_second_place_of_the_password_or_user_is_refused() {
        for other in [
            json!("app_a"),
            json!("x pa/ss w0rd x"),
            json!("https://h/?p=pa%2Fss%20w0rd"),
            json!("https://h/?p=pa%2fss%20w0rd"),
            json!("postgresql://app_a@h/d"),
            json!("jdbc:postgresql://h/d?user=app_a"),
            json!({"deep": ["pa/ss w0rd"]}),
        ] {
            let current = secret(&json!({"username": "app_a", "password": "pa/ss w0rd", "other": other}));
            let failure = next(&settings(None), &current, "new").err().unwrap();
            assert_eq!(failure.trouble, Trouble::ValueUnfit, "{other}");
            assert!(failure.message.contains("`other`") && !failure.message.contains("w0rd"), "{failure}");
        }
        let harmless =
            json!({"username": "app_a", "password": "pa/ss w0rd", "host": "app_a", "other": "app_ab"});
        assert!(next(&settings(None), &secret(&harmless), "new").is_ok());
    }

    #[test]
    fn a_uri_is_rebuilt() {
        let settings = settings(Some("url"));
        for (before, after) in [
            (
                "postgresql://app_a:old@h:5432/d?sslmode=verify-full",
                "postgresql://app_b:n%2Fw%40@h:5432/d?sslmode=verify-full",
            ),
            ("postgres://h1:1,h2:2/d", "postgres://app_b:n%2Fw%40@h1:1,h2:2/d"),
            ("postgresql://app_a@[::1]", "postgresql://app_b:n%2Fw%40@[::1]"),
            ("postgresql:///d", "postgresql://app_b:n%2Fw%40@/d"),
        ] {
            let current = secret(&json!({"username": "app_a", "password": "old", "url": before}));
            let pending = next(&settings, &current, "n/w@").unwrap();
            assert_eq!(read(&pending)["url"], after);
            Pair::read(&settings, &current, &pending).unwrap();
        }
        for bad in ["mysql://h", "h:5432", "postgresql://h/d?user=app_a", "postgresql://h/d?x=1&password=old"]
        {
            let current = secret(&json!({"username": "app_a", "password": "old", "url": bad}));
            assert!(next(&settings, &current, "new").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pending_value_must_be_the_other_users_and_whole() {
        let current = secret(&json!({"username": "app_a", "password": "old"}));
        let url = "postgresql://app_b:other@h/d";
        for (field, pending) in [
            (None, json!({"username": "app_a", "password": "new"})),
            (None, json!({"username": "app_c", "password": "new"})),
            (None, json!({"username": "app_b", "password": ""})),
            (None, json!({"username": "app_b", "password": "n\u{e9}w"})),
            (None, json!({"username": "app_b", "password": "n\nw"})),
            (None, json!({"username": "app_b"})),
            (None, json!("new")),
            (Some("url"), json!({"username": "app_b", "password": "new"})),
            (Some("url"), json!({"username": "app_b", "password": "new", "url": url})),
        ] {
            let failure = Pair::read(&settings(field), &current, &secret(&pending)).err().unwrap();
            assert_eq!(failure.trouble, Trouble::ValueUnfit, "{pending}");
        }
    }

    proptest! {
        #[test]
        fn encoding_goes_there_and_back(text in ".{0,40}") {
            let there = encoded(&text);
            prop_assert!(there.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%".contains(&byte)));
            prop_assert_eq!(decoded(&there).to_vec(), text.as_bytes().to_vec());
        }

        #[test]
        fn a_rebuilt_uri_says_what_it_was_given(user in "[ -~]{1,12}", password in "[ -~]{1,20}") {
            let field = member("url").unwrap();
            let url = rebuilt("postgresql://old:old@h:1/d?x=1", &field, &user, &password).unwrap();
            let credential = Credential { username: user, password: Zeroizing::new(password) };
            prop_assert!(url_says(&url, &field, &credential).is_ok());
            prop_assert!(url.ends_with("@h:1/d?x=1"));
        }
    }
}
