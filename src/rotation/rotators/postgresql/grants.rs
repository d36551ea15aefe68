//! Whether two users may do the same.
//!
//! What a role may do is made of facts: its attributes, its memberships, its settings, what it is granted on each kind
//! of object, what it will be granted on future ones, the row policies that name it. Grants are compared by their
//! effect: where one user has a table by itself and the other through a role, both have it. What is the same for all
//! roles, and what both have through the same memberships, needs no comparing; so only objects are asked about whose
//! access list names one of the two.
//!
//! INVARIANT: no value of a setting is in a message, for some keep secrets there.

use super::session::{Row, Session};
use super::statements::{identifier, literal};
use crate::rotation::{Failure, Trouble};

/// How many differences a message names.
const MOST_NAMED: usize = 5;

/// Compares two users, and sees that neither owns what `owner` should.
pub(super) async fn compare(session: &mut Session, users: &[String; 2], owner: &str) -> Result<(), Failure> {
    let asked = |error| super::failed(error, "compare what the two users may do");
    let owned = session.query(&ownership(users)).await.map_err(asked)?;
    if let Some(drift) = owned_by_one(&owned, owner) {
        return Err(Failure::new(Trouble::GrantDrift, drift));
    }
    let differing = session.query(&differences(users)).await.map_err(asked)?;
    match differing.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Trouble::GrantDrift, told(&differing))),
    }
}

/// The failure of a session that does not act as the owner.
pub(super) fn acts_as_itself(user: &str, acting: &str, owner: &str) -> Failure {
    let (user, owner) = (identifier(user), identifier(owner));
    Failure::new(
        Trouble::GrantDrift,
        format!("{user} acts as {}; run ALTER ROLE {user} SET role TO {owner}", identifier(acting)),
    )
}

fn column(row: &Row, index: usize) -> &str {
    row.get(index).and_then(Option::as_deref).unwrap_or("?")
}

fn owned_by_one(rows: &[Row], owner: &str) -> Option<String> {
    let first = rows.first()?;
    let user = identifier(column(first, 1));
    let named: Vec<_> = rows.iter().take(MOST_NAMED).map(|row| column(row, 2)).collect();
    Some(format!(
        "{user} itself owns {} of {} object(s) that {} should own: run REASSIGN OWNED BY {user} TO {} in each database",
        named.join(", "),
        column(first, 0),
        identifier(owner),
        identifier(owner)
    ))
}

fn told(rows: &[Row]) -> String {
    let count = rows.first().map_or("?", |row| column(row, 0));
    let named = rows.iter().take(MOST_NAMED);
    let named: Vec<_> =
        named.map(|row| format!("{} alone has {}", identifier(column(row, 1)), column(row, 2))).collect();
    format!("the users differ in {count} thing(s): {}", named.join("; "))
}

/// Columns: how many there are in all, the user, what it owns. In other databases names are not to be had.
fn ownership(users: &[String; 2]) -> String {
    let users = users.each_ref().map(|user| literal(user)).join(", ");
    format!(
        "SELECT count(*) OVER (), r.rolname,
    CASE WHEN d.dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
      THEN pg_describe_object(d.classid, d.objid, d.objsubid) ELSE format('something in database %s', b.datname) END
  FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid LEFT JOIN pg_database b ON b.oid = d.dbid
  WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype = 'o' AND r.rolname IN ({users})
  ORDER BY 2, 3 LIMIT {MOST_NAMED}"
    )
}

/// Columns: how many there are in all, the user that alone has it, what it has.
fn differences(users: &[String; 2]) -> String {
    let users = users.each_ref().map(|user| literal(user)).join(", ");
    format!(
        "WITH pair(role, name) AS (
  SELECT oid, rolname FROM pg_roles WHERE rolname IN ({users})
), granted(kind, oid, attnum, name, acl) AS (
  SELECT CASE relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, oid, 0::int2, oid::regclass::text, relacl
    FROM pg_class
  UNION ALL SELECT 'column', attrelid, attnum, format('%s.%I', attrelid::regclass, attname), attacl FROM pg_attribute
  UNION ALL SELECT 'schema', oid, 0::int2, nspname, nspacl FROM pg_namespace
  UNION ALL SELECT 'function', oid, 0::int2, oid::regprocedure::text, proacl FROM pg_proc
  UNION ALL SELECT 'type', oid, 0::int2, oid::regtype::text, typacl FROM pg_type
  UNION ALL SELECT 'language', oid, 0::int2, lanname, lanacl FROM pg_language
  UNION ALL SELECT 'database', oid, 0::int2, datname, datacl FROM pg_database
  UNION ALL SELECT 'foreign server', oid, 0::int2, srvname, srvacl FROM pg_foreign_server
), asked AS (
  SELECT DISTINCT g.kind, g.oid, g.attnum, g.name,
      p.privilege_type || CASE WHEN p.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS privilege
    FROM granted g, aclexplode(g.acl) p WHERE g.acl IS NOT NULL AND p.grantee IN (SELECT role FROM pair)
), fact(role, rank, shown, detail) AS (
  SELECT r.oid, 1, format('another %s', e.key), e.value::text
    FROM pg_roles r, jsonb_each(to_jsonb(r) - '{{oid,rolname,rolpassword,rolconfig}}'::text[]) e
  UNION ALL SELECT m.member, 2, format('membership of %s', m.roleid::regrole),
      (to_jsonb(m) - '{{oid,member,roleid,grantor}}'::text[])::text FROM pg_auth_members m
  UNION ALL SELECT s.setrole, 3, format('the setting %s', split_part(c.config, '=', 1)),
      format('%s %s', s.setdatabase, c.config) FROM pg_db_role_setting s, unnest(s.setconfig) c(config)
  UNION ALL SELECT p.role, 4, format('%s on %s %s', a.privilege, a.kind, a.name), '' FROM asked a, pair p
    WHERE CASE a.kind
      WHEN 'table' THEN has_table_privilege(p.role, a.oid, a.privilege)
      WHEN 'sequence' THEN has_sequence_privilege(p.role, a.oid, a.privilege)
      WHEN 'column' THEN has_column_privilege(p.role, a.oid, a.attnum, a.privilege)
      WHEN 'schema' THEN has_schema_privilege(p.role, a.oid, a.privilege)
      WHEN 'function' THEN has_function_privilege(p.role, a.oid, a.privilege)
      WHEN 'type' THEN has_type_privilege(p.role, a.oid, a.privilege)
      WHEN 'language' THEN has_language_privilege(p.role, a.oid, a.privilege)
      WHEN 'database' THEN has_database_privilege(p.role, a.oid, a.privilege)
      ELSE has_server_privilege(p.role, a.oid, a.privilege) END
  UNION ALL SELECT p.grantee, 5, format('default %s on new %s of %s', p.privilege_type,
      CASE d.defaclobjtype WHEN 'r' THEN 'tables' WHEN 'S' THEN 'sequences' WHEN 'f' THEN 'functions'
        WHEN 'T' THEN 'types' ELSE 'schemas' END, d.defaclrole::regrole),
      format('%s %s', d.defaclnamespace, p.is_grantable) FROM pg_default_acl d, aclexplode(d.defaclacl) p
  UNION ALL SELECT d.defaclrole, 6, 'default privileges of its own', format('%s %s %s %s', d.defaclnamespace,
      d.defaclobjtype, p.privilege_type, p.grantee::regrole) FROM pg_default_acl d, aclexplode(d.defaclacl) p
    WHERE p.grantee <> d.defaclrole
  UNION ALL SELECT r.role, 7, format('the row policy %s on %s', y.polname, y.polrelid::regclass), ''
    FROM pg_policy y, unnest(y.polroles) r(role)
)
SELECT count(*) OVER (), min(p.name), f.shown FROM fact f JOIN pair p USING (role)
  GROUP BY f.rank, f.shown, f.detail HAVING count(DISTINCT f.role) = 1
  ORDER BY f.rank, f.shown, 2 LIMIT {MOST_NAMED}"
    )
}

/// A session's answer to `statements::WHO`.
pub(super) fn who(rows: &[Row]) -> Option<(&str, &str)> {
    rows.first().map(|row| (column(row, 0), column(row, 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(columns: [&str; 3]) -> Row {
        columns.map(|column| Some(column.to_owned())).into()
    }

    #[test]
    fn differences_are_named_and_counted() {
        let rows =
            [row(["7", "app_a", "SELECT on table public.t"]), row(["7", "app_b", "membership of extra"])];
        assert_eq!(
            told(&rows),
            "the users differ in 7 thing(s): \"app_a\" alone has SELECT on table public.t; \
             \"app_b\" alone has membership of extra"
        );
    }

    #[test]
    fn what_one_owns_is_named_with_the_mend() {
        assert_eq!(owned_by_one(&[], "owner"), None);
        let told = owned_by_one(&[row(["1", "app_a", "table t"])], "owner").unwrap();
        assert!(
            told.contains("table t") && told.contains("REASSIGN OWNED BY \"app_a\" TO \"owner\""),
            "{told}"
        );
    }
}
