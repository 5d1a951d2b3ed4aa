-- Wireshark dissector for the IKE_SA_SYNC payload of draft-xu-ike-sa-sync-01, as docs/protocol.md lays it out.
--
-- Copy it into Wireshark's folder of personal Lua plugins (Help, About, Folders), or:
--     tshark -X lua_script:wireshark/ike_sa_sync.lua -Y ike_sa_sync -V -r FILE
--
-- Wireshark's own ISAKMP dissector shows a payload of a private type as octets; this one finds it in the same message
-- and shows its fields in a tree of its own. Display filter: ike_sa_sync

local sync = Proto("ike_sa_sync", "IKE_SA_SYNC (draft-xu-ike-sa-sync-01)")

local PAYLOAD_TYPE = 200
local HEADER, PAYLOAD_HEADER, FIXED = 28, 4, 12
local ENCRYPTED = { [46] = true, [53] = true }

local directions = { [0] = "from the client", [1] = "from the gateway" }
local families = { [4] = "IPv4", [6] = "IPv6" }
local attributes = { [1] = "PROOF", [2] = "CHILD", [3] = "SEALED_STUB", [4] = "LIFETIME", [5] = "MOVE", [6] = "OLD_CHILDREN",
  [7] = "REFUSAL", [8] = "GATEWAYS", [9] = "FORWARD_SECRECY" }
local statuses = { [0] = "asked", [1] = "moving", [2] = "target not configured", [3] = "target silent",
  [4] = "target refused", [5] = "busy", [6] = "gateway gone", [7] = "probe", [8] = "here", [9] = "gateway lives",
  [10] = "daemon answers", [11] = "not here" }

local fields = {
  direction = ProtoField.uint8("ike_sa_sync.direction", "Direction (C)", base.DEC, directions, 0x80),
  version = ProtoField.uint8("ike_sa_sync.version", "Version", base.DEC, nil, 0x7f),
  family = ProtoField.uint8("ike_sa_sync.family", "Address family", base.DEC, families),
  reserved = ProtoField.uint16("ike_sa_sync.reserved", "Reserved", base.HEX),
  spi = ProtoField.bytes("ike_sa_sync.spi", "Old gateway's SPI"),
  ipv4 = ProtoField.ipv4("ike_sa_sync.gateway", "Old gateway's address"),
  ipv6 = ProtoField.ipv6("ike_sa_sync.gateway6", "Old gateway's address"),
  attribute = ProtoField.uint16("ike_sa_sync.attribute", "Attribute", base.DEC, attributes),
  length = ProtoField.uint16("ike_sa_sync.attribute.length", "Length of value"),
  proof = ProtoField.bytes("ike_sa_sync.proof", "PROOF"),
  child_number = ProtoField.uint16("ike_sa_sync.child.number", "Child number"),
  child_spi = ProtoField.uint32("ike_sa_sync.child.spi", "ESP SPI", base.HEX),
  sealed_stub = ProtoField.bytes("ike_sa_sync.sealed_stub", "SEALED_STUB"),
  lifetime = ProtoField.uint32("ike_sa_sync.lifetime", "LIFETIME (s)"),
  move_status = ProtoField.uint8("ike_sa_sync.move.status", "Status", base.DEC, statuses),
  move_target = ProtoField.ipv4("ike_sa_sync.move.target", "Target gateway"),
  old_child = ProtoField.uint32("ike_sa_sync.old_child.spi", "ESP SPI that the old gateway received on", base.HEX),
  move_target6 = ProtoField.ipv6("ike_sa_sync.move.target6", "Target gateway"),
  refusal = ProtoField.string("ike_sa_sync.refusal", "REFUSAL, why"),
  known = ProtoField.ipv4("ike_sa_sync.known", "Gateway that resumes too"),
  known6 = ProtoField.ipv6("ike_sa_sync.known6", "Gateway that resumes too"),
  value = ProtoField.bytes("ike_sa_sync.attribute.value", "Value"),
}
for _, field in pairs(fields) do
  table.insert(sync.fields, field)
end

local malformed = ProtoExpert.new("ike_sa_sync.malformed", "IKE_SA_SYNC is malformed", expert.group.MALFORMED,
  expert.severity.ERROR)
sync.experts = { malformed }

-- Where Wireshark found an IKE header: in the packet, or behind a non-ESP marker.
local initiator_spi = Field.new("isakmp.ispi")

local function show_attribute(tree, kind, value)
  if value:len() == 0 then
    return
  elseif kind == 1 then
    tree:add(fields.proof, value)
  elseif kind == 2 and value:len() == 6 then
    tree:add(fields.child_number, value:range(0, 2))
    tree:add(fields.child_spi, value:range(2, 4))
  elseif kind == 3 then
    tree:add(fields.sealed_stub, value)
  elseif kind == 4 and value:len() == 4 then
    tree:add(fields.lifetime, value)
  elseif kind == 5 and (value:len() == 5 or value:len() == 17) then
    tree:add(fields.move_status, value:range(0, 1))
    tree:add(value:len() == 5 and fields.move_target or fields.move_target6, value:range(1))
  elseif kind == 7 then
    tree:add(fields.refusal, value)
  elseif kind == 6 and value:len() % 4 == 0 then
    -- in the order of their child numbers, from 0
    for offset = 0, value:len() - 4, 4 do
      tree:add(fields.old_child, value:range(offset, 4))
    end
  elseif kind == 8 then
    local branch = tree:add(fields.value, value)
    local offset = 0
    while offset < value:len() do
      local size = ({ [4] = 4, [6] = 16 })[value:range(offset, 1):uint()]
      if size == nil or offset + 1 + size > value:len() then
        branch:add_proto_expert_info(malformed, "no address of family 4 or 6")
        return
      end
      branch:add(size == 4 and fields.known or fields.known6, value:range(offset + 1, size))
      offset = offset + 1 + size
    end
  else
    tree:add(fields.value, value)
  end
end

local function show(body, root)
  local tree = root:add(sync, body)
  if body:len() < FIXED then
    tree:add_proto_expert_info(malformed, "shorter than its fixed part")
    return
  end
  tree:add(fields.direction, body:range(0, 1))
  tree:add(fields.version, body:range(0, 1))
  tree:add(fields.family, body:range(1, 1))
  tree:add(fields.reserved, body:range(2, 2))
  tree:add(fields.spi, body:range(4, 8))
  local family = body:range(1, 1):uint()
  local size = ({ [4] = 4, [6] = 16 })[family]
  if size == nil or FIXED + size > body:len() then
    tree:add_proto_expert_info(malformed, "no address of family 4 or 6")
    return
  end
  tree:add(family == 4 and fields.ipv4 or fields.ipv6, body:range(FIXED, size))
  local offset = FIXED + size
  while offset < body:len() do
    if offset + 4 > body:len() then
      tree:add_proto_expert_info(malformed, "an attribute is cut")
      return
    end
    local kind, length = body:range(offset, 2):uint(), body:range(offset + 2, 2):uint()
    if offset + 4 + length > body:len() then
      tree:add_proto_expert_info(malformed, "an attribute is cut")
      return
    end
    local branch = tree:add(fields.attribute, body:range(offset, 2))
    branch:add(fields.length, body:range(offset + 2, 2))
    if length > 0 then
      show_attribute(branch, kind, body:range(offset + 4, length))
    end
    offset = offset + 4 + length
  end
end

function sync.dissector(buffer, pinfo, root)
  local found = initiator_spi()
  if found == nil then
    return
  end
  local start = found.offset
  if start + HEADER > buffer:len() then
    return
  end
  local kind, offset = buffer:range(start + 16, 1):uint(), start + HEADER
  while kind ~= 0 and offset + PAYLOAD_HEADER <= buffer:len() do
    local following, length = buffer:range(offset, 1):uint(), buffer:range(offset + 2, 2):uint()
    if length < PAYLOAD_HEADER or offset + length > buffer:len() then
      return
    end
    if kind == PAYLOAD_TYPE and length > PAYLOAD_HEADER then
      show(buffer:range(offset + PAYLOAD_HEADER, length - PAYLOAD_HEADER), root)
      pinfo.cols.info:append(" [IKE_SA_SYNC]")
    end
    if ENCRYPTED[kind] then
      return
    end
    kind, offset = following, offset + length
  end
end

register_postdissector(sync)
