//! What holds for every operation of the document: its problems, its headers, its examples.
use model::Code;
use serde_json::{Map, Value, json};

use super::{links, shape};
use crate::error::Failure;

/// Statuses that any request can end with.
const ALWAYS: &[u16] = &[400, 401, 403, 408, 429, 500, 503];
/// Statuses that requests about one resource can end with, besides.
const ABOUT_ONE: &[u16] = &[404, 409, 502];
/// Statuses that requests which change something can end with, besides.
const CHANGES: &[u16] = &[404, 409, 412, 413, 415, 422, 502, 507];

/// Examples of request bodies, by operation and content type; the same files are for people.
pub(crate) const EXAMPLES: &[(&str, &str, &str)] = &[
    ("create_server", "application/json", include_str!("../../../api/examples/create-server.json")),
    (
        "update_server",
        "application/merge-patch+json",
        include_str!("../../../api/examples/update-server.json"),
    ),
    ("stop_server", "application/json", include_str!("../../../api/examples/stop-server.json")),
    (
        "create_console_token",
        "application/json",
        include_str!("../../../api/examples/create-console-token.json"),
    ),
    (
        "limit_server_migration",
        "application/json",
        include_str!("../../../api/examples/limit-migration.json"),
    ),
    (
        "settle_server_migration",
        "application/json",
        include_str!("../../../api/examples/settle-migration.json"),
    ),
    ("migrate_server", "application/json", include_str!("../../../api/examples/migrate-server.json")),
    (
        "create_migration_ticket",
        "application/json",
        include_str!("../../../api/examples/create-migration-ticket.json"),
    ),
    ("import_image", "application/json", include_str!("../../../api/examples/import-image.json")),
    ("update_image", "application/merge-patch+json", include_str!("../../../api/examples/update-image.json")),
    (
        "update_volume",
        "application/merge-patch+json",
        include_str!("../../../api/examples/update-volume.json"),
    ),
    ("snapshot_server", "application/json", include_str!("../../../api/examples/snapshot-server.json")),
    ("restore_server", "application/json", include_str!("../../../api/examples/restore-server.json")),
    ("clone_snapshot", "application/json", include_str!("../../../api/examples/clone-snapshot.json")),
    ("clone_server", "application/json", include_str!("../../../api/examples/clone-server.json")),
    (
        "update_snapshot",
        "application/merge-patch+json",
        include_str!("../../../api/examples/update-snapshot.json"),
    ),
    ("create_network", "application/json", include_str!("../../../api/examples/create-network.json")),
    (
        "update_network",
        "application/merge-patch+json",
        include_str!("../../../api/examples/update-network.json"),
    ),
];

/// Completes one operation.
pub(super) fn finish(path: &str, method: &str, operation: &mut Value) {
    let name = operation["operationId"].as_str().unwrap_or_default().to_owned();
    let traits = Traits {
        changes: method != "get",
        about_one: path.contains("{id}"),
        long: operation["responses"].get("202").is_some(),
        about_many: path.contains("/servers/actions/"),
        conditional: matches!(
            name.as_str(),
            "read_server" | "read_image" | "read_snapshot" | "read_operation"
        ),
    };
    let headers = request_headers(traits);
    if let Some(members) = operation.as_object_mut().filter(|_| !headers.is_empty()) {
        let parameters = members.entry("parameters").or_insert_with(|| json!([]));
        parameters.as_array_mut().into_iter().for_each(|all| all.extend(headers.iter().cloned()));
    }
    if let Some(body) = operation.get_mut("requestBody") {
        shape::make_optional(body);
        for (_, content_type, text) in EXAMPLES.iter().filter(|(operation, _, _)| *operation == name) {
            body["content"][content_type]["example"] = serde_json::from_str(text).unwrap_or_default();
        }
    }
    let mut statuses = ALWAYS.to_vec();
    if traits.about_one {
        statuses.extend(ABOUT_ONE);
    }
    if traits.changes {
        statuses.extend(CHANGES);
    }
    if name == "follow_events" {
        statuses.push(410);
        operation["responses"]["200"]["content"]["text/event-stream"]["schema"] = server_sent_event();
    }
    let Some(responses) = operation["responses"].as_object_mut() else { return };
    if traits.conditional {
        responses.insert("304".into(), json!({ "description": "The caller has this version." }));
    }
    for (status, response) in responses.iter_mut() {
        document_headers(status, traits, response);
        if let Some(links) = links::of(&name, status) {
            response["links"] = links;
        }
    }
    for status in statuses {
        let reference = format!("#/components/responses/Problem{status}");
        responses.insert(status.to_string(), json!({ "$ref": reference }));
    }
}

/// One event of a stream, with its fields as SSE names them.
fn server_sent_event() -> Value {
    json!({
        "type": "object",
        "properties": {
            "id": { "type": "string", "description": "Position: send the last one as `Last-Event-ID`." },
            "event": { "type": "string", "description": "Its `type`, or `problem` when the stream cannot go on." },
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": { "$ref": "#/components/schemas/Event" },
            },
        },
        "required": ["data"],
    })
}

/// What kind of operation it is.
#[derive(Clone, Copy)]
struct Traits {
    changes: bool,
    about_one: bool,
    about_many: bool,
    long: bool,
    conditional: bool,
}

fn request_headers(traits: Traits) -> Vec<Value> {
    let header = |name: &str, schema: Value, description: &str| json!({ "name": name, "in": "header", "required": false, "description": description, "schema": schema });
    let strict = |pattern: &str| json!({ "type": "string", "pattern": pattern });
    // Conditions and preferences that make no sense are ignored, as their RFCs want; so anything fits.
    let lenient = |example: &str| json!({ "type": "string", "examples": [example] });
    let mut headers = Vec::new();
    if traits.changes {
        headers.push(header(
            "Idempotency-Key",
            strict("^[!-~]{1,128}$"),
            "Makes the request safe to repeat: the same key with the same request is answered as the first time, \
             with `Idempotency-Replayed: true`.",
        ));
    }
    if traits.changes && traits.about_one {
        headers.push(header(
            "If-Match",
            strict("^(\\*|\"[0-9]{1,20}\"(, ?\"[0-9]{1,20}\"){0,7})$"),
            "`ETag` of the version that is to be changed; another version is answered 412.",
        ));
    }
    if traits.long {
        headers.push(header(
            "Prefer",
            lenient("wait=10"),
            "`wait=10` answers when the work has ended, or after so many seconds (at most 60). Work that failed is \
             then answered with its problem.",
        ));
    }
    if traits.conditional {
        headers.push(header(
            "If-None-Match",
            lenient("\"7\""),
            "`ETag` that the caller has; the same version is answered 304.",
        ));
    }
    headers
}

/// Headers of successful answers.
fn document_headers(status: &str, traits: Traits, response: &mut Value) {
    let header = |description: &str| json!({ "description": description, "schema": { "type": "string" } });
    let mut headers = match response["headers"].take() {
        Value::Object(headers) => headers,
        _ => Map::new(),
    };
    headers.insert("X-Request-Id".into(), header("Names the request in the daemon's log."));
    match status {
        "201" => headers.insert("Location".into(), header("Path of what was made.")),
        "202" if !traits.about_many => headers.insert("Location".into(), header("Path of the operation.")),
        "200" | "304" if traits.conditional => {
            headers.insert("ETag".into(), header("Version of the resource."))
        }
        _ => None,
    };
    if traits.changes && status != "101" {
        let replayed = "`true` when this is the answer to an earlier request with the same key.";
        headers.insert("Idempotency-Replayed".into(), header(replayed));
    }
    response["headers"] = Value::Object(headers);
}

/// One reusable response for every status that has codes.
pub(super) fn problems() -> Value {
    let mut responses = Map::new();
    for code in Code::ALL {
        let name = format!("Problem{}", code.status());
        if responses.contains_key(&name) {
            continue;
        }
        let same = Code::ALL.iter().filter(|other| other.status() == code.status());
        let description: Vec<String> =
            same.map(|code| format!("`{}`: {}", code.as_str(), code.meaning().trim())).collect();
        let mut headers = json!({
            "X-Request-Id": { "description": "Names the request in the daemon's log.", "schema": { "type": "string" } },
        });
        if matches!(code.status(), 429 | 503) {
            headers["Retry-After"] =
                json!({ "description": "Seconds to wait.", "schema": { "type": "integer", "minimum": 0 } });
        }
        let example = Failure::new(*code, code.meaning().trim())
            .problem("/v1/servers", "019abcde0123789a8bcdef0123456789");
        let response = json!({
            "description": description.join(" "),
            "headers": headers,
            "content": { "application/problem+json": {
                "schema": { "$ref": "#/components/schemas/Problem" },
                "example": example,
            } },
        });
        responses.insert(name, response);
    }
    Value::Object(responses)
}
